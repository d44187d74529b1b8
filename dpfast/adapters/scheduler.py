"""A drop-in ``DDIMScheduler`` whose step is the fused guided one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dpfast.adapters import live_pipeline
from dpfast.adapters.gradient import LearnerGradient, Network, no_anchor
from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.solver_tables import SolverTable, ddim_table
from dpfast.ops import guided_step


@dataclass(frozen=True, kw_only=True)
class _Attached:
    """A learner, and the network and condition of the batch that it guides."""

    gradient: LearnerGradient
    network: Network
    condition: Mapping[str, Tensor]
    batch: int | None
    doubled: bool  # DiTPipeline steps each sample twice under classifier-free guidance
    pipe: Callable[[], Any]  # the pipeline, or None once it is gone
    sample_ids: Tensor | None
    seed: int


class GuidedDDIMScheduler(diffusers.DDIMScheduler):
    """A ``DDIMScheduler`` with the same results, guided once a learner is attached.

    ``step`` is ``dpfast.guided_step``. A guided step is that of ``GuidedSampler``: the gradient at
    the step's input, the move of the latents, the prediction from before the move. A scheduler is
    called after the network and without its graph, so the gradient takes one more conditional
    forward. through="latent" takes none: it holds the prediction that the scheduler was given,
    which under classifier-free guidance is the combined one, where the sampler holds the
    conditional one; the two agree without classifier-free guidance.

    An anchor takes the difference of the combined prediction from the conditional one, which is
    that of classifier-free guidance times its scale less 1: so it needs such guidance without a
    ``guidance_rescale``, and through="denoiser", whose gradient makes the conditional one. Of a
    ``StableDiffusionPipeline`` its call says so: a loop of one's own has no anchor there.

    A timestep must be on the grid of ``set_timesteps``. ``use_clipped_model_output`` with a bound
    on x0 has no fused form and raises ``InputError``.
    """

    _attached: _Attached | None = None
    _tables: dict[tuple[int, float, torch.device], SolverTable] | None = None

    def attach(
        self,
        pipe: Any,
        learner: Callable[[Tensor], Tensor],
        *,
        guidance: GuidanceConfig | None = None,
        decoder: Any = None,
        labels: Tensor | Sequence[int] | None = None,
        prompts: Sequence[str] | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
        chunk: int | None = None,
    ) -> GuidedDDIMScheduler:
        """Guides the next calls of ``pipe`` by the learner, until ``detach``.

        An attachment is never saved.

        Args:
            pipe: A ``DiTPipeline``, ``StableDiffusionPipeline`` or ``DDIMPipeline``.
            learner: As in ``dpfast.adapters.gradient.LearnerGradient``.
            guidance: As in ``LearnerGradient``.
            decoder: As in ``LearnerGradient``; None is the pipeline's own.
            labels: (B,) class ids: the condition of a ``DiTPipeline``, which needs them, and the
                criterion's labels.
            prompts: One a sample, for a ``StableDiffusionPipeline``, which needs them.
            sample_ids: (B,) keys of the noise of eta > 0, as in ``GuidedSampler``; None: the
                pipeline's generator.
            seed: Seed of that noise.
            image_size: As in ``LearnerGradient``.
            chunk: As in ``LearnerGradient``.

        Returns:
            The scheduler itself.

        Raises:
            TypeError: For another pipeline.
            InputError: For a missing condition and for an anchor that has nothing to be made of.
        """
        gradient = LearnerGradient(
            learner=learner,
            guidance=guidance or GuidanceConfig(),
            decoder=getattr(pipe, "vae", None) if decoder is None else decoder,
            labels=labels,
            image_size=image_size,
            chunk=chunk,
        )
        doubled = isinstance(pipe, diffusers.DiTPipeline)
        anchor = gradient.guidance.anchor
        if anchor and gradient.guidance.through == "latent":
            raise no_anchor(anchor, "through = 'latent' makes no conditional prediction here")
        if anchor and isinstance(pipe, diffusers.DDIMPipeline):
            raise no_anchor(anchor, "a DDIMPipeline has no classifier-free guidance")
        condition: Mapping[str, Tensor] = {}
        if doubled:
            if gradient.labels is None:
                raise InputError(
                    "labels is None: expected the class ids that the DiTPipeline is called with"
                )
            rows = pipe.transformer.config.num_embeds_ada_norm
            if int(max(gradient.labels)) >= rows:
                raise InputError(
                    f"labels = {int(max(gradient.labels))}: the model has {rows} classes"
                )
            condition = {"class_labels": torch.as_tensor(gradient.labels).to(pipe.device)}
        elif isinstance(pipe, diffusers.StableDiffusionPipeline):
            if prompts is None or isinstance(prompts, str):
                raise InputError(
                    f"prompts = {prompts!r}: expected a list of "
                    "the prompts that the pipeline is called with"
                )
            condition = live_pipeline.encoded(pipe, list(prompts))
        elif not isinstance(pipe, diffusers.DDIMPipeline):
            raise TypeError(
                f"pipe is a {type(pipe).__name__}, expected a DiTPipeline, StableDiffusionPipeline "
                "or DDIMPipeline"
            )
        batch = len(next(iter(condition.values()))) if condition else None
        ids = (
            None
            if sample_ids is None
            else torch.as_tensor(sample_ids, dtype=torch.int64).to(pipe.device)
        )
        if ids is not None and (ids.dim() != 1 or batch not in (None, len(ids))):
            raise InputError(
                f"sample_ids has shape {tuple(ids.shape)}, expected one id a sample: ({batch},)"
            )
        self._attached = _Attached(
            gradient=gradient,
            network=live_pipeline.network_of(pipe),
            condition=condition,
            batch=batch,
            doubled=doubled,
            pipe=weakref.ref(pipe),
            sample_ids=ids,
            seed=seed,
        )
        return self

    def detach(self) -> None:
        """Returns to a plain DDIM."""
        self._attached = None

    @property
    def skipped(self) -> int:
        """The number of guided steps of single samples whose gradient was not finite."""
        return 0 if self._attached is None else self._attached.gradient.skipped

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Takes a step as ``DDIMScheduler.step`` does, guided while a learner is attached.

        The prediction of x0 that it returns is the guided one.

        Raises:
            InputError: For ``use_clipped_model_output`` with a bound on x0, and a timestep that is
                not on the grid.
        """
        if self.num_inference_steps is None:
            raise InputError("the scheduler has no timesteps: call set_timesteps first")
        if eta > 0 and variance_noise is not None and generator is not None:
            raise InputError("generator and variance_noise are both given: expected at most one")
        table = self._table(eta, sample.device)
        if use_clipped_model_output and table.clip is not None:
            raise InputError(
                "use_clipped_model_output = True: has no fused form while the scheduler bounds x0"
            )
        index, attached = live_pipeline.position(self, timestep), self._attached
        gradient = conditional = ids = None
        omega, anchor, mode = 0.0, 0.0, "relative"
        skipped, seed = None, 0
        if attached is not None:
            config = attached.gradient.guidance
            ids, seed = self._ids(attached, len(sample)), attached.seed
            config.check_steps(len(table))
            if config.omega and index in config.steps(len(table)):
                gradient, made = self._gradient(attached, table, index, sample, model_output)
                (omega, anchor), mode = config.at(index, len(table)), config.mode
                conditional = made if anchor else None
        x0 = torch.empty_like(sample)
        if gradient is not None and attached is not None:
            skipped = torch.zeros((), dtype=torch.int64, device=sample.device)
        following = guided_step(
            sample,
            model_output,
            conditional,  # the step sees the difference, and at a scale of 1 the combined one
            gradient,
            table.rows,
            index,
            cfg_scale=1.0,
            omega=omega,
            anchor=anchor,
            mode=mode,  # type: ignore[arg-type]
            prediction=live_pipeline.check_scheduler(self),
            clip=table.clip,
            sample_ids=ids if table.needs_noise else None,
            seed=seed,
            x0_out=x0,
            skipped=skipped,
        )
        if skipped is not None and attached is not None:
            twice = attached.batch is not None and len(sample) == 2 * attached.batch
            attached.gradient.counter(sample.device).add_(skipped // 2 if twice else skipped)
        if table.needs_noise and ids is None:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device,
                    dtype=model_output.dtype,
                )
            following = following + (table.rows[index, 5] * variance_noise).to(following.dtype)
        return (
            DDIMSchedulerOutput(prev_sample=following, pred_original_sample=x0)
            if return_dict
            else (following, x0)
        )

    def _table(self, eta: float, device: torch.device) -> SolverTable:
        self._tables = {} if self._tables is None else self._tables
        key = (self.num_inference_steps, eta, device)
        if key not in self._tables:
            plain = diffusers.DDIMScheduler.from_config(self.config)
            self._tables[key] = ddim_table(plain, self.num_inference_steps, eta=eta).to(device)
        return self._tables[key]

    @staticmethod
    def _ids(attached: _Attached, size: int) -> Tensor | None:
        ids = attached.sample_ids
        if ids is not None and size != len(ids):
            ids = torch.cat([ids, ids]) if attached.doubled and size == 2 * len(ids) else ids
            if len(ids) != size:
                raise InputError(
                    f"the pipeline steps {size} samples, attached are {len(ids)} sample_ids"
                )
        return ids

    def _gradient(
        self, attached: _Attached, table: SolverTable, index: int, x: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the gradient at x, and the prediction that it was taken through."""
        twice = attached.doubled and attached.batch is not None and len(x) == 2 * attached.batch
        if attached.batch is not None and len(x) != attached.batch and not twice:
            raise InputError(
                f"the pipeline steps {len(x)} samples, attached is the condition of "
                f"{attached.batch}"
            )
        anchor = attached.gradient.guidance.anchor
        if anchor:
            cfg = twice if attached.doubled else live_pipeline.has_cfg(attached.pipe())
            if cfg is None:
                raise no_anchor(
                    anchor,
                    "no call of the pipeline tells how the prediction was made; call the pipeline",
                )
            if not cfg:
                raise no_anchor(
                    anchor, "the pipeline runs without classifier-free guidance, or rescales it"
                )
        size = len(x) // 2 if twice else len(x)
        found = attached.gradient(
            x[:size],
            table.timesteps[index],
            *table.rows[index, :2],
            network=attached.network,
            prediction=live_pipeline.check_scheduler(self),
            condition=attached.condition,
            held=prediction[:size].float(),
        )
        gradient, made = (torch.cat([part, part]) if twice else part for part in found)
        return gradient, made
