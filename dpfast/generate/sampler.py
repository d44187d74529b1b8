"""``GuidedSampler``: class labels to images, pushed towards high entropy under a learner while they
are made.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dpfast.config import SolverName
from dpfast.errors import InputError
from dpfast.generate import check, criteria
from dpfast.generate import preflight as probing
from dpfast.generate.feature_cache import FeatureCache, cached_steps
from dpfast.generate.graphs import CudaRecorder, Recorder
from dpfast.generate.guidance import GuidanceConfig, GuidancePath, check_interval, interval_steps
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.runtime.compiling import CompileCosts, Tuner
from dpfast.generate.runtime.execution import Execution, Region
from dpfast.generate.runtime.regional import has_region
from dpfast.generate.step import StepInputs, StepParts, Variant
from dpfast.generate.stream import in_batches
from dpfast.generate.trajectory import Trajectory, filled
from dpfast.hardware.device import is_gpu
from dpfast.hardware.out_of_memory import release
from dpfast.ops import normal
from dpfast.ops.noise import check_seed
from dpfast.samples import SampleBatch

log = logging.getLogger(__name__)
INITIAL_NOISE = 0  # the Philox stream of the first latent; the streams of the steps follow it
Learner = Callable[[Tensor], Tensor]


class GuidedSampler:
    """Samples a diffusers pipeline folder with classifier-free guidance and guidance by a learner.

    The same sample id, label, seed and learner give the same image in any batch, up to the rounding
    of fp32 sums (noise is bit-identical). The learner is read live: an update of its weights in
    place shows in the next batch.

    Args:
        pipeline: from ``Pipeline.from_pretrained``.
        learner: images (B, C, H, W) in [-1, 1] to logits (B, K), in ``eval()`` mode while it
        guides; None: unguided.
        guidance: strength, schedule and criterion; ignored without a learner.
        steps, solver, eta: of the trajectory, as in ``Pipeline.table``.
        cfg_scale: diffusers' convention; 1 switches classifier-free guidance off.
        cfg_interval: the part of the trajectory with classifier-free guidance, fractions of the
        steps. Outside of it
            the conditional prediction runs alone, which halves the price of a step and changes the
            images.
        cache_interval: of a run of unguided steps every one so many runs the whole denoiser, the
        others reuse the
            features of its inner blocks (``dpfast.generate.feature_cache``); 1: every step is
            whole.
        seed: key of all noise.
        image_size: (H, W) that the learner takes; None: as decoded.
        memory_budget: bytes for the differentiated half of a guided step. It runs in chunks that
        fit, by a measurement
            of this model; where chunks would be small its blocks are recomputed as well, except in
            steps that are compiled as a whole. None: in one.
        compile: True, False or "auto", which compiles where that pays within the samples of a
        ``stream`` (``tuner``
            says what came of it). Compiled steps round differently: say True or False where bits
            must repeat.
        compile_region: "step" compiles whole steps, "blocks" the denoiser's transformer blocks
        alone, once for all of
            them: a compile time that does not grow with the depth, for steps that are less fused.
        cuda_graphs: replay steps from CUDA graphs; None: on a GPU.

    Raises ``InputError`` or ``TypeError`` for an argument that cannot work; the learner is tried
    out on two black images when the first batch is asked for.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        learner: Learner | None = None,
        *,
        guidance: GuidanceConfig | None = None,
        steps: int = 15,
        solver: SolverName = "auto",
        cfg_scale: float = 1.5,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        eta: float = 0.0,
        cache_interval: int = 1,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
        memory_budget: int | None = None,
        compile: bool | Literal["auto"] = "auto",
        compile_region: Region = "step",
        cuda_graphs: bool | None = None,
    ) -> None:
        if not isinstance(guidance, GuidanceConfig | None):
            raise TypeError(f"guidance must be a GuidanceConfig, got {guidance!r}")
        check.number("cfg_scale", cfg_scale)
        check.pair("cfg_interval", cfg_interval, Real, "(start, stop), fractions of the steps")
        check_interval("cfg_interval", *cfg_interval)
        if image_size is not None:
            check.pair("image_size", image_size, Integral, "(height, width) in pixels")
        if memory_budget is not None:
            check.count("memory_budget", memory_budget, "bytes, at least 1, or None")
        check.count("cache_interval", cache_interval, "at least 1, which reuses nothing")
        if compile not in (True, False, "auto"):
            raise InputError(f"compile = {compile!r}: expected True, False or 'auto'")
        if compile_region not in get_args(Region):
            raise InputError(
                f"compile_region = {compile_region!r}: expected one of "
                f"{', '.join(get_args(Region))}"
            )
        if compile_region == "blocks" and not has_region(pipeline.denoiser):
            raise InputError(
                "compile_region = 'blocks': this denoiser has no transformer blocks; use 'step'"
            )
        self.compile_region = compile_region
        self.pipeline = pipeline
        self.guidance = guidance or GuidanceConfig()
        self.cfg_scale = cfg_scale
        self.cfg_interval = cfg_interval
        self.cache_interval = cache_interval
        self.seed = seed
        self.memory_budget = memory_budget
        self.table = pipeline.table(steps, solver=solver, eta=eta)
        denoiser = pipeline.denoiser
        self.cache = FeatureCache(denoiser) if cache_interval > 1 else None
        if (
            learner is not None
            and self.guidance.through == "latent"
            and denoiser.prediction == "sample"
        ):
            raise InputError(
                "through = 'latent': this denoiser predicts x0 itself, which leaves no path around "
                "it"
            )
        self._path: GuidancePath | None = None
        if learner is not None:
            self._path = GuidancePath(
                denoiser=denoiser,
                decoder=pipeline.guidance_decoder,
                learner=learner,
                criterion=criteria.named(self.guidance.criterion),
                image_size=image_size,
                through=self.guidance.through,
            )
        on_gpu = is_gpu(pipeline.device)
        self.recorder: Recorder | None = (
            CudaRecorder(pipeline.device) if on_gpu and cuda_graphs is not False else None
        )
        if cuda_graphs and not on_gpu:
            raise InputError(
                f"cuda_graphs = True: needs a pipeline on a GPU, this one is on {pipeline.device}"
            )
        model = getattr(denoiser, "model", denoiser)
        names = [type(part).__name__ for part in (model, learner) if part is not None]
        described = f"{' + '.join(names)} {denoiser.sample_shape}"
        described += " by blocks" if compile_region == "blocks" else ""
        self.tuner = Tuner(CompileCosts(pipeline.device, described), compile)
        self._indices = [torch.tensor(i, device=pipeline.device) for i in range(len(self.table))]
        self._execution: Execution | None = None
        # guided or not -> the largest batch of a stream: what fits, or fitted where memory ran out
        self.fitting: dict[bool, int] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        learner: Learner | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        attention: str = "sdpa",
        channels_last: bool = False,
        **options: Any,
    ) -> GuidedSampler:
        """``GuidedSampler(Pipeline.from_pretrained(folder, device=..., dtype=..., ...), learner,
        **options)``.
        """
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        placed |= {"attention": attention, "channels_last": channels_last}
        return cls(Pipeline.from_pretrained(folder, **placed), learner, **options)

    @property
    def learner(self) -> Learner | None:
        """The guiding learner. Update it in place; another learner needs another sampler."""
        return None if self._path is None else self._path.learner

    @property
    def execution(self) -> Execution:
        """The steps, once a batch was asked for."""
        self.check_learner()
        assert self._execution is not None
        return self._execution

    def check_learner(self) -> None:
        """Tries the learner and the criterion out, once, and fits guidance into the memory budget.

        Raises ``ValueError`` where they do not fit the pipeline or the budget.
        """
        if self._execution is None:
            self._execution = Execution(
                self._parts(), recorder=self.recorder, region=self.compile_region
            )

    def variants(self, *, guided: bool, cfg_scale: float | None = None) -> list[Variant]:
        """The variant of each step of a trajectory, guided or not; cfg_scale: None is the
        sampler's.
        """
        scale = self.cfg_scale if cfg_scale is None else cfg_scale
        total = len(self.table)
        guided_steps = self.guidance.steps(total) if guided else frozenset()
        has_cfg = scale != 1 and self.pipeline.denoiser.null_label is not None
        cfg_steps = interval_steps(total, *self.cfg_interval) if has_cfg else range(0)
        guided_at, cfg_at = (
            [i in steps for i in range(total)] for steps in (guided_steps, cfg_steps)
        )
        features = cached_steps(guided_at, cfg_at, self.cache_interval)
        return [Variant(*kinds) for kinds in zip(guided_at, cfg_at, features, strict=True)]

    def check_labels(self, labels: Tensor) -> None:
        """Raises ``InputError`` for a label that the generator does not know."""
        classes = self.pipeline.denoiser.classes
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise InputError(
                f"labels = {int(wrong[0])}: the generator has {classes} classes, 0 to {classes - 1}"
            )

    def generate(
        self,
        labels: Tensor | Sequence[int],
        sample_ids: Tensor | Sequence[int] | None = None,
        *,
        omega: float | Tensor | None = None,
        cfg_scale: float | None = None,
        learner_step: int = 0,
    ) -> SampleBatch:
        """One batch.

        labels: (B,) class ids; sample_ids: (B,) keys of the noise, default 0..B-1; omega: a number
        or (B,) tensor in place of the configured strength; cfg_scale: in place of the configured
        one.
        """
        labels, ids, strengths = self._checked(labels, sample_ids, 0, omega)
        scale = self._scale(cfg_scale)
        if not len(labels):
            raise InputError("labels is empty: expected at least one")
        self._prepare(len(labels))
        return self._generate(labels, ids, strengths, scale, learner_step)

    @torch.no_grad()
    def begin(
        self,
        labels: Tensor | Sequence[int],
        sample_ids: Tensor | Sequence[int],
        *,
        omega: float | Tensor | None = None,
        cfg_scale: float | None = None,
        latents: Tensor | None = None,
        step: int = 0,
    ) -> Trajectory:
        """A batch before its first step, for ``advance``; the arguments of ``generate``.

        latents: (B, c, h, w) clean latents, such as ``SampleBatch.latents``: with them the batch
        begins at ``step``, from alpha latents + sigma noise of that step (SDEdit, Meng et al. 2022,
        arXiv 2108.01073). A multistep solver takes them for the x0 of the step before.

        Raises ``InputError`` for a step outside the trajectory, a step without latents and latents
        of another shape.
        """
        labels, ids, strengths = self._checked(labels, sample_ids, 0, omega)
        scale = self._scale(cfg_scale)
        shape = (len(labels), *self.pipeline.denoiser.sample_shape)
        if not 0 <= step < len(self.table):
            raise InputError(f"step = {step}: expected 0 to {len(self.table) - 1}")
        if latents is None and step:
            raise InputError(f"step = {step}: a trajectory begins there only from latents")
        if latents is not None and latents.shape != shape:
            raise InputError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        self._prepare(len(labels))
        noise = normal(ids, shape[1:], seed=self.seed, stream=INITIAL_NOISE)
        if latents is None:
            return self._begun(noise, labels, ids, strengths, scale)
        clean = latents.to(noise)
        alpha, sigma = self.table.rows[step, :2]
        held = clean if self.table.needs_x0_prev else None
        return replace(
            self._begun(noise, labels, ids, strengths, scale),
            x=alpha * clean + sigma * noise,
            x0_prev=held,
            step=step,
        )

    @torch.no_grad()
    def advance(self, trajectory: Trajectory, stop: int | None = None) -> Trajectory:
        """Runs the steps before ``stop``; None: all that are left. Reads nothing on the host.

        Raises ``InputError`` for a stop that lies behind the trajectory or beyond the last step.
        """
        total = len(self.table)
        last = total if stop is None else stop
        if not trajectory.step <= last <= total:
            raise InputError(f"stop = {stop}: expected {trajectory.step} to {total}")
        execution, table, size = self.execution, self.table, len(trajectory)
        x, x0_prev, labels, ids = (
            trajectory.x,
            trajectory.x0_prev,
            trajectory.labels,
            trajectory.sample_ids,
        )
        features = trajectory.features
        omega, value, device = trajectory.omega, trajectory.value, trajectory.x.device
        if execution.batch is not None and size > execution.batch:
            execution.close()  # prepared for less: eager steps take any size
        execution.refresh()
        variants = self.variants(guided=omega is not None, cfg_scale=trajectory.cfg_scale)
        strengths = torch.zeros(size, device=device) if omega is None else omega
        valid = None
        if execution.batch is not None:
            more = execution.batch - size
            valid = torch.arange(execution.batch, device=device) < size
            x, labels, ids, strengths = (filled(rows, more) for rows in (x, labels, ids, strengths))
            x0_prev, features = (
                None if rows is None else filled(rows, more) for rows in (x0_prev, features)
            )
        inputs = StepInputs(
            x=x,
            x0_prev=x0_prev,
            labels=labels,
            sample_ids=ids,
            valid=valid,
            step=self._indices[0],
            rows=table.rows,
            timesteps=table.timesteps,
            omega=strengths,
            cfg_scale=torch.full(
                (), float(trajectory.cfg_scale), device=device
            ),  # filled there; a copy would be waited for
            seed=torch.full(
                (), int(check_seed("seed", self.seed, device)), dtype=torch.int64, device=device
            ),
        )
        skipped = trajectory.skipped.clone()
        for index in range(trajectory.step, last):
            variant = variants[index]
            if variant.features != "reuse":
                features = None
            elif features is None:  # the trajectory begins here
                variant = variant._replace(features="keep")
            out = execution.step(
                variant, inputs._replace(step=self._indices[index], features=features)
            )
            features = out.features if variant.features == "keep" else features
            inputs = inputs._replace(x=out.x, x0_prev=out.x0)
            if out.skipped is not None:
                skipped += out.skipped
            if (
                out.value is not None and last < total
            ):  # a replayed step writes the next batch's where this one's lies
                value = out.value[:size].clone()
        x, x0_prev = inputs.x[:size], inputs.x0_prev
        if last < total:
            x, x0_prev = x.clone(), None if x0_prev is None else x0_prev[:size].clone()
            wanted = features is not None and variants[last].features == "reuse"
            features = features[:size].clone() if features is not None and wanted else None
        return replace(
            trajectory,
            x=x,
            x0_prev=x0_prev,
            value=value,
            features=features,
            skipped=skipped,
            step=last,
        )

    @torch.no_grad()
    def finish(self, trajectory: Trajectory, *, learner_step: int = 0) -> SampleBatch:
        """Decodes a trajectory behind its last step."""
        if trajectory.step != len(self.table):
            raise InputError(
                f"the trajectory is before step {trajectory.step} of {len(self.table)}: advance it "
                "first"
            )
        size, latents = len(trajectory), trajectory.x
        prepared = self.execution.batch
        images, entropy = self.execution.finish(
            latents if prepared is None else filled(latents, prepared - size)
        )
        dropped = int(
            trajectory.skipped
        )  # the one host read of a batch, when all its work is in the queue
        if dropped:
            log.warning(
                "guidance was skipped %d times in a batch of %d: gradients not finite",
                dropped,
                size,
            )
        return SampleBatch(
            images=images[:size],
            labels=trajectory.labels,
            sample_ids=trajectory.sample_ids,
            entropy=entropy[:size],
            learner_step=learner_step,
            skipped=dropped,
            latents=latents.to(
                torch.float16, copy=True
            ),  # the next batch may be made where this one lies
        )

    def stream(
        self,
        labels: Tensor | Sequence[int],
        *,
        first_id: int = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        omega: float | Tensor | None = None,
        cfg_scale: float | None = None,
        learner_step: int = 0,
    ) -> Iterator[SampleBatch]:
        """Yields batches for all ``labels`` in their order, each sample once.

        sample_ids: (N,) keys of the noise, default counting up from ``first_id``; omega: a number
        or (N,) tensor; cfg_scale: a number, each in place of the configured one.
        batch_size: "auto" doubles the batch while samples per second grow and memory lasts. Running
        out of memory halves any batch and goes on; later streams do not try it again. Bad input
        raises here, not at the first batch.
        """
        if batch_size != "auto" and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int)
        ):
            raise TypeError(f"batch_size must be an integer or 'auto', got {batch_size!r}")
        if batch_size != "auto" and batch_size < 1:
            raise InputError(f"batch_size = {batch_size}: expected at least 1, or 'auto'")
        labels, ids, strengths = self._checked(labels, sample_ids, first_id, omega)
        scale = self._scale(cfg_scale)

        def make(part: slice) -> SampleBatch:
            return self._generate(
                labels[part],
                ids[part],
                None if strengths is None else strengths[part],
                scale,
                learner_step,
            )

        variants = self.variants(guided=strengths is not None, cfg_scale=scale)
        return in_batches(self, make, len(labels), batch_size, variants)

    def release(self) -> None:
        """Gives back the memory of captured steps, for others to use until the next batch captures
        them anew.

        A capture's memory is a pool of its own, which no other allocation can use while the capture
        lives: 12 GiB for 32 unguided samples of Stable Diffusion 1.5 at 512 px, 37 GiB for as many
        guided ones (counted). Capturing again takes 2.2 s, to the end of the first batch (measured
        on an H200), and a round of such samples minutes to hours: so nothing stays captured between
        rounds. What was compiled holds code and no memory of the device, takes minutes to make
        again, and stays.
        """
        if self._execution is not None:
            self._execution.release()
        if self.recorder is not None:
            self.recorder.close()
            release(self.pipeline.device)

    def close(self) -> None:
        """Releases compiled steps, CUDA graphs and their memory. The sampler stays usable."""
        if self._execution is not None:
            self._execution.close()
        if self.recorder is not None:
            self.recorder.close()

    def _checked(
        self,
        labels: Tensor | Sequence[int],
        sample_ids: Tensor | Sequence[int] | None,
        first_id: int,
        omega: float | Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Everything a trajectory needs, on the device, or an error: labels, ids, strengths (None:
        unguided).
        """
        device = self.pipeline.device
        labels = check.integers("labels", labels)
        if labels.dim() != 1:
            raise InputError(f"labels has shape {tuple(labels.shape)}, expected (B,)")
        default = torch.arange(first_id, first_id + len(labels))
        ids = default if sample_ids is None else check.integers("sample_ids", sample_ids)
        if ids.shape != labels.shape:
            raise InputError(
                f"sample_ids has shape {tuple(ids.shape)}, expected one per label: "
                f"{tuple(labels.shape)}"
            )
        self.check_labels(labels)
        strengths = check.strengths("omega", self.guidance.omega if omega is None else omega)
        if strengths.shape not in ((), labels.shape):
            raise InputError(
                f"omega has shape {tuple(strengths.shape)}, expected () or {tuple(labels.shape)}"
            )
        if not bool(strengths.isfinite().all()):
            raise InputError("omega must be finite")
        # Everything is looked at where it was given: what comes from the host costs no wait for the
        # device.
        guided = self._path is not None and bool(strengths.any())
        easy = guided and bool((strengths < 0).any())
        labels, ids, strengths = (
            tensor.to(device, non_blocking=True) for tensor in (labels, ids, strengths)
        )
        if self._path is None:
            return labels, ids, None
        if isinstance(self._path.learner, nn.Module) and self._path.learner.training:
            raise InputError(
                "learner is in training mode, where samples of a batch may mix; call learner.eval()"
            )
        if self._path.criterion is criteria.entropy and easy:
            _warn_of_easy_samples()
        self.check_learner()
        return labels, ids, strengths.expand(len(labels)).contiguous() if guided else None

    def _scale(self, cfg_scale: float | None) -> float:
        """The scale of a trajectory: the configured one, or another."""
        if cfg_scale is None:
            return self.cfg_scale
        check.number("cfg_scale", cfg_scale)
        return cfg_scale

    def _parts(self) -> StepParts:
        """What the steps are made of, after the learner and the criterion have been tried out."""
        pipeline, path = self.pipeline, self._path
        if path is not None:
            probing.try_learner(
                path, pipeline.denoiser.sample_shape, pipeline.denoiser.classes, pipeline.device
            )
            if self.memory_budget is not None:
                recompute = self.tuner.mode is False or self.compile_region == "blocks"
                path = probing.bounded(path, self.table, self.memory_budget, recompute=recompute)
        return StepParts(
            denoiser=pipeline.denoiser,
            decoder=pipeline.decoder,
            path=path,
            mode=self.guidance.mode,
            clip=self.table.clip,
            multistep=self.table.needs_x0_prev,
            noise=self.table.needs_noise,
            cache=self.cache,
        )

    def _prepare(self, size: int) -> None:
        """Compiled and captured steps for a batch of ``size``, where they are asked for."""
        if self.tuner.mode is True or self.recorder is not None:
            size = max(size, self.execution.batch or 0)
            self.execution.prepare(size, compile=self.tuner.mode is True or self.execution.compiled)

    @torch.no_grad()
    def _generate(
        self,
        labels: Tensor,
        ids: Tensor,
        omega: Tensor | None,
        cfg_scale: float,
        learner_step: int,
    ) -> SampleBatch:
        noise = normal(
            ids, self.pipeline.denoiser.sample_shape, seed=self.seed, stream=INITIAL_NOISE
        )
        return self.finish(
            self.advance(self._begun(noise, labels, ids, omega, cfg_scale)),
            learner_step=learner_step,
        )

    @torch.no_grad()
    def denoise(self, x: Tensor, labels: Tensor, sample_ids: Tensor) -> Tensor:
        """Runs all steps on initial latents (B, c, h, w), unit noise, and returns the final
        latents.
        """
        checked = self._checked(labels, sample_ids, 0, None)
        return self.advance(self._begun(x, *checked, self.cfg_scale)).x

    def _begun(
        self,
        noise: Tensor,
        labels: Tensor,
        ids: Tensor,
        omega: Tensor | None,
        cfg_scale: float,
    ) -> Trajectory:
        return Trajectory(
            x=noise * self.table.initial_scale,
            x0_prev=torch.zeros_like(noise) if self.table.needs_x0_prev else None,
            labels=labels,
            sample_ids=ids,
            omega=omega,
            cfg_scale=cfg_scale,
            skipped=torch.zeros((), dtype=torch.int64, device=noise.device),
        )


@functools.cache
def _warn_of_easy_samples() -> None:
    """Once a process."""
    warnings.warn(
        "omega is negative: guidance lowers the learner's entropy and makes easy samples",
        UserWarning,
        stacklevel=4,
    )
