"""``GuidedSampler``: class labels to images, pushed towards high entropy under a learner while they
are made.

How a guided sample comes about stands in four files, to be read in this order:

    sampler     the specification, and the way of a batch: begin, advance, finish
    step        a batch between two steps, and a step as one pure function
    guidance    the gradient of the criterion at a noisy latent
    criteria    what guidance raises

What makes it fast and safe lies beside them: ``runner`` compiles, captures and sizes batches,
``bounded`` saves memory, ``feature_cache`` saves work, ``preflight`` checks what is given. The
formulas of a step's update are one operation, ``dpfast.ops.guided_step``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpfast.config import SolverName
from dpfast.errors import InputError
from dpfast.generate import check, preflight
from dpfast.generate.feature_cache import cached_steps
from dpfast.generate.graphs import Recorder
from dpfast.generate.guidance import GuidanceConfig, Schedule, cfg_steps, interval_steps
from dpfast.generate.models.denoiser import embeds_scale
from dpfast.generate.models.regional import Region
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.preflight import Request
from dpfast.generate.runner import Runner
from dpfast.generate.step import Trajectory, Variant
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
    place shows in the next batch; another learner needs another sampler. It is tried out on a few
    images of noise when the first batch is asked for.

    Args:
        pipeline: From ``Pipeline.from_pretrained``.
        learner: Function from images (B, C, H, W) in [-1, 1] to logits (B, K), in ``eval()`` mode
            while it guides; None: unguided.
        guidance: Strength, schedule and criterion; ignored without a learner.
        steps: Steps of a trajectory, as in ``Pipeline.table``.
        solver: Name of the solver, as in ``Pipeline.table``.
        cfg_scale: Scale of classifier-free guidance by diffusers' convention; 1 switches it off. A
            model that embeds it makes one prediction with it.
        cfg_interval: Part of the trajectory with classifier-free guidance, fractions of the steps.
            A step outside runs the conditional prediction alone, for half the price.
        cfg_schedule: Factors of cfg_scale - 1 by step, as ``omega_schedule`` of ``GuidanceConfig``;
            a step in which the factor is 0 runs the conditional prediction alone.
        eta: Noise of the solver, as in ``Pipeline.table``.
        cache_interval: In a run of unguided steps every one so many runs the whole denoiser, the
            others reuse features (``dpfast.generate.feature_cache``); 1: every step is whole.
        seed: Key of all noise.
        image_size: (H, W) that the learner takes; None: as decoded.
        memory_budget: Bytes for the differentiated half of a guided step, which then runs in
            chunks (``dpfast.generate.bounded``); None: in one.
        micro_batch: Most samples of a ``stream`` that are made at a time; None: as many as fit.
        compile: True, False or "auto", which compiles where that pays within the samples of a
            ``stream``. Compiled steps round differently: say True or False where bits must repeat.
        compile_region: "step" compiles whole steps, "blocks" the blocks that repeat in denoiser,
            decoders and learner alone, once for all of a kind
            (``dpfast.generate.models.regional``).
        cuda_graphs: True replays steps from CUDA graphs; None: on a GPU; or what records them.

    Raises:
        InputError: For an argument that cannot work.
        TypeError: For an argument of another type.

    Examples:
        >>> import dpfast
        >>> sampler = dpfast.GuidedSampler.from_pretrained("fashion", steps=2)
        >>> batch = sampler.generate([8, 5])
        >>> batch.images.shape, batch.labels
        (torch.Size([2, 1, 32, 32]), tensor([8, 5]))
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
        cfg_schedule: Schedule = (),
        eta: float = 0.0,
        cache_interval: int = 1,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
        memory_budget: int | None = None,
        micro_batch: int | None = None,
        compile: bool | Literal["auto"] = "auto",
        compile_region: Region = "step",
        cuda_graphs: bool | Recorder | None = None,
    ) -> None:
        loaded = "a Pipeline, which GuidedSampler.from_pretrained loads from a folder"
        check.instance("pipeline", pipeline, Pipeline, loaded)
        check.instance("guidance", guidance, GuidanceConfig | None, "a GuidanceConfig")
        check_seed("seed", seed, pipeline.device)
        check.number("cfg_scale", cfg_scale)
        check.pair("cfg_interval", cfg_interval, Real, "(start, stop), fractions of the steps")
        check.interval("cfg_interval", *cfg_interval)
        check.schedule("cfg_schedule", cfg_schedule)
        check.count("cache_interval", cache_interval, "at least 1, which reuses nothing")
        if image_size is not None:
            check.pair("image_size", image_size, Integral, "(height, width) in pixels")
            for side in image_size:
                check.count("image_size", side, "sides of at least 1 pixel")
        self.pipeline = pipeline
        self.learner = learner
        self.guidance = guidance or GuidanceConfig()
        self.cfg_scale = cfg_scale
        self.cfg_interval = cfg_interval
        self.cfg_schedule = cfg_schedule
        self.cache_interval = cache_interval
        self.seed = seed
        self.table = pipeline.table(steps, solver=solver, eta=eta)
        if not interval_steps(len(self.table), *cfg_interval):
            raise InputError(
                f"cfg_interval = {tuple(cfg_interval)}: none of the {len(self.table)} steps begins "
                "in it; expected at least one"
            )
        if not cfg_steps(cfg_interval, cfg_schedule, len(self.table)):
            raise InputError(
                f"cfg_schedule = {cfg_schedule!r}: its factor is 0 in all steps of cfg_interval; "
                "expected another one in at least one, or cfg_scale = 1"
            )
        if learner is not None:
            self.guidance.check_steps(len(self.table))
            preflight.tell_of_full_decoder(pipeline)
        self.parts = preflight.step_parts(
            pipeline,
            learner,
            self.guidance,
            self.table,
            cfg_schedule=cfg_schedule,
            image_size=image_size,
            cached=cache_interval > 1,
        )
        self.runner = Runner(
            self.parts,
            self.table,
            compile=compile,
            region=compile_region,
            cuda_graphs=cuda_graphs,
            memory_budget=memory_budget,
            micro_batch=micro_batch,
        )

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
        fused: bool | Literal["auto"] = "auto",
        **options: Any,
    ) -> GuidedSampler:
        """Loads the pipeline by ``Pipeline.from_pretrained`` and makes its sampler.

        Args:
            folder: Folder of a pipeline, or "owner/name" on the Hub.
            learner: As in ``GuidedSampler``.
            device: As in ``Pipeline.from_pretrained``.
            dtype: As in ``Pipeline.from_pretrained``.
            attention: As in ``Pipeline.from_pretrained``.
            channels_last: As in ``Pipeline.from_pretrained``.
            fused: As in ``Pipeline.from_pretrained``.
            **options: Further arguments of ``GuidedSampler``.

        Raises:
            InputError: As ``Pipeline.from_pretrained`` and ``GuidedSampler`` do.
            TypeError: As ``GuidedSampler`` does.
        """
        pipeline = Pipeline.from_pretrained(
            folder,
            device=device,
            dtype=dtype,
            attention=attention,
            channels_last=channels_last,
            fused=fused,
        )
        return cls(pipeline, learner, **options)

    def variants(
        self, *, guided: bool, cfg_scale: float | None = None, x0: bool = False
    ) -> tuple[Variant, ...]:
        """Returns the variant of each step of a trajectory.

        Args:
            guided: True for a guided trajectory.
            cfg_scale: Scale of classifier-free guidance; None: the configured one.
            x0: True lets every step give its x0.
        """
        total = len(self.table)
        scale = self.cfg_scale if cfg_scale is None else cfg_scale
        has_cfg = scale != 1 and self.pipeline.denoiser.null_label is not None
        guided_steps = self.guidance.steps(total) if guided else frozenset()
        with_cfg = (
            cfg_steps(self.cfg_interval, self.cfg_schedule, total) if has_cfg else frozenset()
        )
        guided_at = [i in guided_steps for i in range(total)]
        cfg_at = [i in with_cfg for i in range(total)]
        features = cached_steps(guided_at, cfg_at, self.cache_interval)
        kinds = zip(guided_at, cfg_at, features, strict=True)
        return tuple(Variant(*kind, x0=x0) for kind in kinds)

    def generate(
        self,
        labels: Tensor | Sequence[int],
        sample_ids: Tensor | Sequence[int] | None = None,
        *,
        omega: float | Tensor | None = None,
        anchor: float | Tensor | None = None,
        cfg_scale: float | None = None,
        learner_step: int = 0,
    ) -> SampleBatch:
        """Makes one batch of samples.

        Args:
            labels: (B,) class ids.
            sample_ids: (B,) keys of the noise; None: 0 to B - 1.
            omega: A number or (B,) tensor in place of the configured one, whose schedule holds for
                it. The number 0 leaves the guided steps out; a 0 in a tensor runs them and moves
                nothing.
            anchor: A number or (B,) tensor in place of the configured one, whose schedule holds for
                it.
            cfg_scale: Scale of classifier-free guidance in place of the configured one.
            learner_step: Optimiser steps of the learner, which the batch keeps.

        Raises:
            InputError: For labels that are no classes, other shapes, a learner that cannot guide,
                and latents or images that are not finite.
            TypeError: For values of another type.
        """
        check.integer("learner_step", learner_step)
        begun = self.begin(labels, sample_ids, omega=omega, anchor=anchor, cfg_scale=cfg_scale)
        return self.finish(self.advance(begun), learner_step=learner_step)

    @torch.no_grad()
    def begin(
        self,
        labels: Tensor | Sequence[int],
        sample_ids: Tensor | Sequence[int] | None = None,
        *,
        omega: float | Tensor | None = None,
        anchor: float | Tensor | None = None,
        cfg_scale: float | None = None,
        latents: Tensor | None = None,
        step: int = 0,
        keep_x0: bool = False,
    ) -> Trajectory:
        """Returns a batch before its first step, for ``advance``.

        Args:
            labels: As in ``generate``.
            sample_ids: As in ``generate``.
            omega: As in ``generate``.
            anchor: As in ``generate``.
            cfg_scale: As in ``generate``.
            latents: (B, c, h, w) clean latents, such as ``SampleBatch.latents``: with them the
                batch begins at ``step``, from alpha latents + sigma noise of that step (SDEdit,
                Meng et al. 2022, arXiv 2108.01073). A multistep solver takes them for the x0 of the
                step before.
            step: Step at which the batch begins.
            keep_x0: True lets ``Trajectory.x0_prev`` be, behind each step, the x0 that it
                predicted, whatever the solver. The samples are the same.

        Raises:
            InputError: For a step outside the trajectory, a step without latents, latents of
                another shape and no labels at all.
            TypeError: For a value of another kind.
        """
        request = self._request(labels, sample_ids, 0, omega, anchor, cfg_scale)
        shape = (len(request.labels), *self.pipeline.denoiser.sample_shape)
        preflight.check_start(shape, latents, step, total=len(self.table))
        if request.anchor is not None:
            self.check_anchored(request.cfg_scale, anchor, step=step)
        self.runner.prepare_one(len(request.labels))
        noise = self._noise(request)
        begun = self._begun(request, noise, keep_x0)
        if latents is None:
            return begun
        clean = latents.to(noise)
        alpha, sigma = self.table.rows[step, :2]
        held = clean if self.table.needs_x0_prev else None
        return replace(begun, x=alpha * clean + sigma * noise, x0_prev=held, step=step)

    @torch.no_grad()
    def advance(self, trajectory: Trajectory, stop: int | None = None) -> Trajectory:
        """Runs the steps before ``stop``, and reads nothing on the host.

        Args:
            trajectory: From ``begin`` or ``advance``.
            stop: Step before which to stop; None: all steps that are left run.

        Raises:
            InputError: For a stop that lies behind the trajectory or beyond the last step.
            TypeError: For what is no trajectory or no step.
        """
        check.instance("trajectory", trajectory, Trajectory, "a Trajectory, which begin gives")
        total = len(self.table)
        last = total if stop is None else check.integer("stop", stop)
        if not trajectory.step <= last <= total:
            raise InputError(f"stop = {stop}: expected {trajectory.step} to {total}")
        state = self.runner.padded(trajectory)
        while state.step < last:
            state = state.after(self.runner.step(state))
        return self.runner.cropped(state, len(trajectory))

    @torch.no_grad()
    def finish(self, trajectory: Trajectory, *, learner_step: int = 0) -> SampleBatch:
        """Decodes a trajectory behind its last step.

        Raises:
            InputError: Where latents or decoded images are not finite; it names the part and its
                dtype.
        """
        check.instance("trajectory", trajectory, Trajectory, "a Trajectory, which advance gives")
        check.integer("learner_step", learner_step)
        if trajectory.step != len(self.table):
            place = f"step {trajectory.step} of {len(self.table)}"
            raise InputError(f"the trajectory is before {place}: advance it first")
        images, entropy, finite = self.runner.finish(trajectory.x)
        # the one host read of a batch, when all its work is in the queue
        counts = torch.cat([trajectory.skipped.reshape(1), (~finite).sum(0)]).cpu()
        skipped, *lost = counts.tolist()
        if any(lost):
            raise self._not_finite(trajectory.sample_ids[~finite.all(1)].tolist(), lost)
        if skipped:
            told = "guidance was skipped %d times in a batch of %d: gradients not finite"
            log.warning(told, skipped, len(trajectory))
        return SampleBatch(
            images=images,
            labels=trajectory.labels,
            sample_ids=trajectory.sample_ids,
            entropy=entropy,
            learner_step=learner_step,
            skipped=skipped,
            latents=trajectory.x.to(torch.float16),
        )

    def predictions(
        self,
        labels: Tensor | Sequence[int],
        sample_ids: Tensor | Sequence[int] | None = None,
        *,
        omega: float | Tensor | None = None,
        anchor: float | Tensor | None = None,
        cfg_scale: float | None = None,
        learner_step: int = 0,
    ) -> Iterator[SampleBatch]:
        """Yields one batch as each step predicts it, then as it ends.

        These are ``len(table)`` + 1 batches, the last of which ``generate`` gives for the same
        arguments. A step's prediction is its x0, behind guidance where it is guided (Fig. 8 of
        arXiv 2502.15588): ``latents`` are the x0, ``images`` what they decode to, and ``entropy``
        is that of these images. Bad input raises here, not at the first batch.

        Args:
            labels: As in ``generate``.
            sample_ids: As in ``generate``.
            omega: As in ``generate``.
            anchor: As in ``generate``.
            cfg_scale: As in ``generate``.
            learner_step: As in ``generate``.
        """
        check.integer("learner_step", learner_step)
        begun = self.begin(
            labels, sample_ids, omega=omega, anchor=anchor, cfg_scale=cfg_scale, keep_x0=True
        )
        return self._predictions(begun, learner_step)

    def _predictions(self, state: Trajectory, learner_step: int) -> Iterator[SampleBatch]:
        while state.step < len(self.table):
            state = self.advance(state, state.step + 1)
            assert state.x0_prev is not None
            with torch.no_grad():
                images, entropy, _ = self.runner.finish(state.x0_prev)
            yield SampleBatch(
                images=images,
                labels=state.labels,
                sample_ids=state.sample_ids,
                entropy=entropy,
                learner_step=learner_step,
                latents=state.x0_prev.to(torch.float16),
            )
        yield self.finish(state, learner_step=learner_step)

    def stream(
        self,
        labels: Tensor | Sequence[int],
        *,
        first_id: int = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        batch_size: int | Literal["auto"] = "auto",
        omega: float | Tensor | None = None,
        anchor: float | Tensor | None = None,
        cfg_scale: float | None = None,
        learner_step: int = 0,
    ) -> Iterator[SampleBatch]:
        """Yields batches for all ``labels`` in their order, each sample once.

        Running out of memory halves any batch and goes on; later streams do not try it again. Bad
        input raises here, not at the first batch.

        Args:
            labels: (N,) class ids.
            first_id: Key of the first sample's noise; the keys of the others count up from it.
            sample_ids: (N,) keys of the noise in place of those.
            batch_size: Samples of a batch; "auto" doubles the batch while samples per second grow
                and memory lasts.
            omega: As in ``generate``, a number or (N,).
            anchor: As in ``generate``, a number or (N,).
            cfg_scale: As in ``generate``.
            learner_step: As in ``generate``.

        Raises:
            InputError: As ``generate`` does.
            TypeError: As ``generate`` does.
        """
        check.integer("learner_step", learner_step)
        request = self._request(labels, sample_ids, first_id, omega, anchor, cfg_scale)
        if request.anchor is not None:
            self.check_anchored(request.cfg_scale, anchor)

        @torch.no_grad()
        def make(part: slice) -> SampleBatch:
            rows = request.rows(part)
            begun = self._begun(rows, self._noise(rows))
            return self.finish(self.advance(begun), learner_step=learner_step)

        variants = self.variants(guided=request.guided, cfg_scale=request.cfg_scale)
        return self.runner.batches(len(request.labels), make, batch_size, variants)

    def release(self) -> None:
        """Gives back the memory of captured steps, until the next batch captures them anew."""
        self.runner.release()

    def close(self) -> None:
        """Releases compiled steps, CUDA graphs and their memory. The sampler stays usable."""
        self.runner.close()

    def _request(
        self,
        labels: Tensor | Sequence[int],
        sample_ids: Tensor | Sequence[int] | None,
        first_id: int,
        omega: float | Tensor | None,
        anchor: float | Tensor | None,
        cfg_scale: float | None,
    ) -> Request:
        """Returns the request for samples, checked like the learner before anything is sampled."""
        for name, value in (("omega", omega), ("anchor", anchor)):
            if self.learner is None and value is not None and check.numbers(name, value).any():
                raise InputError(
                    f"{name} = {value}: guides only with a learner, and the sampler has none"
                )
        request = preflight.checked_request(
            labels,
            sample_ids,
            first_id,
            self.guidance.omega if omega is None else omega,
            self.guidance.anchor if anchor is None else anchor,
            self.cfg_scale if cfg_scale is None else cfg_scale,
            pipeline=self.pipeline,
            path=self.parts.path,
        )
        preflight.warn_of_idle_cfg(
            self.pipeline.folder,
            self.pipeline.denoiser.null_label is not None,
            embeds_scale(self.pipeline.denoiser),
            request.cfg_scale,
            tuple(self.cfg_interval) if request.cfg_scale == self.cfg_scale else (0, 1),
        )
        self.runner.check_learner()
        return request

    def check_anchored(
        self,
        cfg_scale: float | None = None,
        anchor: float | Tensor | None = None,
        *,
        step: int = 0,
    ) -> None:
        """Checks that guided samples that begin at ``step`` have what an anchor is made of.

        That is classifier-free guidance in a guided step. Warns, once a process and schedule, where
        ``anchor_schedule`` is 0 in all such steps.

        Args:
            cfg_scale: Scale of classifier-free guidance; None: as configured.
            anchor: Anchor of the samples; None: as configured.
            step: Step at which the samples begin.

        Raises:
            InputError: Where they have not.
        """
        variants = self.variants(guided=True, cfg_scale=cfg_scale)
        preflight.check_anchored(
            self.guidance.anchor if anchor is None else anchor,
            self.pipeline,
            variants[step:],
            self.cfg_scale if cfg_scale is None else cfg_scale,
            self.cfg_interval,
        )
        preflight.warn_of_idle_anchor(self.guidance.anchor_schedule, variants, step)

    def _not_finite(self, ids: list[int], lost: list[int]) -> InputError:
        """Returns the message for samples ``ids`` of which so many lost their latents, and their
        images.
        """
        latents, _ = lost
        pipeline = self.pipeline
        part, model = ("latents", pipeline.denoiser) if latents else ("images", pipeline.decoder)
        whose = "denoiser" if latents else "decoder"
        dtype = getattr(model, "dtype", torch.float32)
        few = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
        return InputError(
            f"dtype = {str(dtype).removeprefix('torch.')!r}: the {whose} gives {part} that are not "
            f"finite, for {len(ids)} samples of the batch (ids {few}); "
            + (
                "its range ends at 65504: use 'bfloat16' or 'float32'"
                if dtype == torch.float16
                else f"look at the weights of the {whose} and at cfg_scale"
            )
        )

    def _noise(self, request: Request) -> Tensor:
        shape = self.pipeline.denoiser.sample_shape
        return normal(request.sample_ids, shape, seed=self.seed, stream=INITIAL_NOISE)

    def _begun(self, request: Request, noise: Tensor, keep_x0: bool = False) -> Trajectory:
        device = noise.device
        seed = int(check_seed("seed", self.seed, device))
        return Trajectory(
            x=noise * self.table.initial_scale,
            x0_prev=torch.zeros_like(noise) if self.table.needs_x0_prev else None,
            labels=request.labels,
            sample_ids=request.sample_ids,
            omega=request.omega,
            anchor=request.anchor,
            # filled there; a copy would be waited for
            cfg_scale=torch.full((), float(request.cfg_scale), device=device),
            settings=(float(request.cfg_scale), seed),
            seed=torch.full((), seed, dtype=torch.int64, device=device),
            skipped=torch.zeros((), dtype=torch.int64, device=device),
            variants=self.variants(guided=request.guided, cfg_scale=request.cfg_scale, x0=keep_x0),
        )
