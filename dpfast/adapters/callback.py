"""Guidance between the steps of a diffusers pipeline: a ``callback_on_step_end``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from dpfast.adapters import live_pipeline
from dpfast.adapters.gradient import LearnerGradient, no_anchor
from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig, label_score

_TENSORS = {
    diffusers.StableDiffusionPipeline: {"prompt_embeds": "encoder_hidden_states"},
    diffusers.StableDiffusion3Pipeline: {
        "prompt_embeds": "encoder_hidden_states",
        "pooled_prompt_embeds": "pooled_projections",
    },
}


class GuidanceCallback(PipelineCallback):
    """Moves a pipeline's latents towards what the learner finds hard, between its steps.

    It is passed as ``pipe(..., callback_on_step_end=callback)``. A callback runs after a step, so
    what it moves is the input of the next: step 0 is never guided, and the gradient takes one more
    conditional forward at the next timestep (a pipeline hands out no graph of its own). The
    prediction that the next step uses is made at the moved latents; ``GuidedSampler`` keeps the one
    from before the move. An anchor takes an unconditional forward there as well, so it needs
    classifier-free guidance (``guidance_scale`` above 1).

    Args:
        pipe: A ``StableDiffusionPipeline`` or a ``StableDiffusion3Pipeline``; its scheduler may be
            replaced later.
        learner: As in ``dpfast.adapters.gradient.LearnerGradient``.
        guidance: As in ``LearnerGradient``, in "relative" mode.
        decoder: Decoder of the guidance path; None: the pipeline's own autoencoder. An
            ``AutoencoderTiny`` is much cheaper.
        labels: As in ``LearnerGradient``.
        image_size: As in ``LearnerGradient``.
        chunk: As in ``LearnerGradient``.

    Raises:
        TypeError: For another pipeline. A ``DiTPipeline`` has no callbacks: use
            ``GuidedDDIMScheduler``.
        InputError: For mode="score", which only a scheduler can do, and a scheduler whose latents
            cannot be moved.
    """

    def __init__(
        self,
        pipe: Any,
        learner: Callable[[Tensor], Tensor],
        *,
        guidance: GuidanceConfig | None = None,
        decoder: Any = None,
        labels: Tensor | Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        kinds = [kind for kind in _TENSORS if isinstance(pipe, kind)]
        if not kinds:
            raise TypeError(
                f"pipe is a {type(pipe).__name__}, expected one of "
                f"{', '.join(kind.__name__ for kind in _TENSORS)}; a "
                "pipeline without callbacks takes a GuidedDDIMScheduler"
            )
        self._names = _TENSORS[kinds[0]]
        self.guidance = guidance or GuidanceConfig()
        if self.guidance.mode != "relative":
            raise InputError(
                "guidance has mode = 'score': a callback moves latents and takes 'relative'"
            )
        live_pipeline.check_scheduler(pipe.scheduler)
        self.gradient = LearnerGradient(
            learner=learner,
            guidance=self.guidance,
            decoder=pipe.vae if decoder is None else decoder,
            labels=labels,
            image_size=image_size,
            chunk=chunk,
        )

    @property
    def tensor_inputs(self) -> list[str]:
        """The names of what the pipeline hands to the callback, which it reads itself."""
        return ["latents", *self._names]

    @property
    def skipped(self) -> int:
        """The number of guided steps of single samples whose gradient was not finite."""
        return self.gradient.skipped

    @torch.no_grad()
    def callback_fn(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Replaces ``callback_kwargs["latents"]`` (B, c, h, w) before a guided step.

        Raises:
            InputError: For ``callback_kwargs`` without the tensors that the callback reads, and
                where no step behind the first is guided.
        """
        missing = [name for name in self.tensor_inputs if name not in callback_kwargs]
        if missing:
            raise InputError(
                f"callback_kwargs lacks {missing[0]!r}: expected the tensors {self.tensor_inputs}"
            )
        scheduler = pipe.scheduler
        prediction = live_pipeline.check_scheduler(scheduler)
        following, total = live_pipeline.position(scheduler, timestep) + 1, len(scheduler.timesteps)
        guided = self.guidance.steps(total) - {0}
        if self.guidance.omega and not guided:
            raise InputError(
                f"guidance: none of the steps 1 to {total - 1} is guided, and step 0 lies before "
                "any callback; expected at least one"
            )
        if following == total or following not in guided or self.guidance.omega == 0:
            return callback_kwargs
        x = callback_kwargs["latents"]
        network, begun = live_pipeline.network_of(pipe), scheduler.timesteps[following]
        gradient, conditional = self.gradient(
            x,
            begun,
            *live_pipeline.levels(scheduler, following),
            network=network,
            prediction=prediction,
            condition={
                argument: live_pipeline.conditional_half(callback_kwargs[name], len(x))
                for name, argument in self._names.items()
            },
        )
        score = None
        if self.guidance.at(following, total)[1]:
            unconditional = network(x, begun, **self._unconditional(callback_kwargs, len(x)))
            score = label_score(conditional, unconditional[:, : x.shape[1]], prediction)
        moved = self.gradient.displaced(x, gradient, score, at=(following, total))
        return {**callback_kwargs, "latents": moved}

    def _unconditional(self, given: dict[str, Any], batch: int) -> dict[str, Tensor]:
        """Returns the condition of the unconditional prediction."""
        rows = {
            argument: live_pipeline.unconditional_half(given[name], batch)
            for name, argument in self._names.items()
        }
        found = {argument: half for argument, half in rows.items() if half is not None}
        if len(found) < len(rows):
            raise no_anchor(
                self.guidance.anchor, "the pipeline runs without classifier-free guidance"
            )
        return found
