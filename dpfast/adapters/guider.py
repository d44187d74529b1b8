"""A guider for diffusers' modular pipelines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from dpfast.adapters import live_pipeline
from dpfast.adapters.gradient import LearnerGradient, no_anchor
from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig, label_score, predict_x0
from dpfast.generate.solver_tables import ddim_table
from dpfast.generate.solvers import is_flow
from dpfast.ops.guided_step import Prediction


class LearnerGuidance(ClassifierFreeGuidance):
    """A ``ClassifierFreeGuidance`` of diffusers, with guidance by a learner once one is attached.

    The conditional forward that the pipeline runs anyway is the one that is differentiated, as in
    ``GuidedSampler``: ``prepare_models`` records it on guided steps, ``cleanup_models`` leaves the
    network as it was. A guider returns a prediction and cannot move latents, so the move of
    "relative" mode becomes the change of the prediction that leads the scheduler to the same next
    latents. That is exact for ``DDIMScheduler`` at eta = 0 and flow-matching Euler; other
    schedulers take mode="score". Schedulers that bound x0 are refused: the two differ where the
    bound is active. An anchor takes the two predictions that the guider is given; a step outside
    ``start`` and ``stop`` has one, and no anchor.

    The configuration is that of ``ClassifierFreeGuidance``; an attachment is never saved.
    ``disable()`` switches both off.
    """

    _gradient: LearnerGradient | None = None
    _scheduler: Any = None
    _x: Tensor | None = None
    _hooks: tuple[Any, ...] = ()
    _frozen: tuple[nn.Parameter, ...] = ()

    def attach(
        self,
        learner: Callable[[Tensor], Tensor],
        scheduler: Any,
        decoder: Any,
        *,
        guidance: GuidanceConfig | None = None,
        labels: Tensor | Sequence[int] | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> LearnerGuidance:
        """Guides by the learner from now on, and returns the guider.

        Args:
            learner: As in ``dpfast.adapters.gradient.LearnerGradient``.
            scheduler: The pipeline's own, ``pipe.scheduler``.
            decoder: The pipeline's own, ``pipe.vae``, or an ``AutoencoderTiny``.
            guidance: As in ``LearnerGradient``.
            labels: As in ``LearnerGradient``.
            image_size: As in ``LearnerGradient``.

        Raises:
            InputError: For a scheduler that the guider cannot follow.
        """
        guidance = guidance or GuidanceConfig()
        prediction = live_pipeline.check_scheduler(scheduler)
        if (
            guidance.mode == "relative"
            and not isinstance(scheduler, diffusers.DDIMScheduler)
            and prediction != "flow"
        ):
            raise InputError(
                "guidance has mode = 'relative': with a "
                f"{type(scheduler).__name__} a guider takes 'score'"
            )
        for option in ("clip_sample", "thresholding"):
            if scheduler.config.get(option):
                raise InputError(
                    f"scheduler option {option} = True: expected False, a guider has no bound on x0"
                )
        if guidance.through == "latent" and prediction == "sample":
            raise InputError(
                "through = 'latent': this model predicts x0 itself, which leaves no path around it"
            )
        self._gradient = LearnerGradient(
            learner=learner,
            guidance=guidance,
            decoder=decoder,
            labels=labels,
            image_size=image_size,
        )
        self._scheduler = scheduler
        return self

    def detach(self) -> None:
        """Returns to classifier-free guidance alone."""
        self._gradient = self._scheduler = self._x = None

    def new(self, **kwargs: Any) -> LearnerGuidance:
        """Returns a copy with other options, and the same attachment."""
        copy = super().new(**kwargs)
        copy._gradient, copy._scheduler = self._gradient, self._scheduler
        return copy

    @property
    def skipped(self) -> int:
        """The number of guided steps of single samples whose gradient was not finite."""
        return 0 if self._gradient is None else self._gradient.skipped

    def _is_guided(self) -> bool:
        if self._gradient is None or not self._enabled or self._timestep is None:
            return False
        config, total = self._gradient.guidance, len(self._scheduler.timesteps)
        config.check_steps(total)
        return bool(config.omega) and live_pipeline.position(
            self._scheduler, self._timestep
        ) in config.steps(total)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Records the conditional forward of a guided step, so that it can be differentiated.

        Raises:
            InputError: For a denoiser that is called without latents.
        """
        super().prepare_models(denoiser)
        if not (self.is_conditional and self._is_guided()) or self._gradient is None:
            return
        self._gradient.check_mode()
        exact = self._gradient.guidance.through == "denoiser"
        outside = torch.is_grad_enabled()
        self._frozen = tuple(p for p in denoiser.parameters() if p.requires_grad) if exact else ()
        for parameter in self._frozen:
            parameter.requires_grad_(False)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = "hidden_states" if "hidden_states" in kwargs else "sample"
            if not args and name not in kwargs:
                raise InputError(
                    "the denoiser is called without latents: expected 'hidden_states' or 'sample'"
                )
            self._x = (args[0] if args else kwargs[name]).detach().requires_grad_(exact)
            torch.set_grad_enabled(exact or outside)
            return ((self._x, *args[1:]), kwargs) if args else (args, {**kwargs, name: self._x})

        def after(*_: Any) -> None:
            torch.set_grad_enabled(outside)

        self._hooks = (
            denoiser.register_forward_pre_hook(before, with_kwargs=True),
            denoiser.register_forward_hook(after, always_call=True),
        )

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leaves the network as it was before ``prepare_models``."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._hooks, self._frozen = (), ()
        super().cleanup_models(denoiser)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Returns the guided prediction, and the two it is made of, without their graphs."""
        uncond = None if pred_uncond is None else pred_uncond.detach()
        output = super().forward(pred_cond.detach(), uncond)
        if self._x is None or self._gradient is None:
            return output
        x, self._x = self._x, None
        return GuiderOutput(
            pred=self._guided(output.pred, x, pred_cond, uncond),
            pred_cond=output.pred_cond,
            pred_uncond=output.pred_uncond,
        )

    def _guided(
        self, pred: Tensor, x: Tensor, pred_cond: Tensor, pred_uncond: Tensor | None
    ) -> Tensor:
        learner, scheduler = self._gradient, self._scheduler
        assert learner is not None
        kind: Prediction = live_pipeline.check_scheduler(scheduler)
        index = live_pipeline.position(scheduler, self._timestep)
        at = (index, len(scheduler.timesteps))
        alpha, sigma = (value.to(x.device) for value in live_pipeline.levels(scheduler, index))
        gradient = learner.finite(self._differentiated(learner, x, pred_cond, alpha, sigma, kind))
        score = self._score(learner, pred_cond.detach(), pred_uncond, x.shape[1], kind)
        if learner.guidance.mode == "score":
            factor = {"epsilon": -sigma, "sample": sigma.square() / alpha}.get(kind, -sigma / alpha)
            omega = learner.guidance.at(*at)[0]
            change = omega * factor * learner.ascended(gradient, score, at=at)
            return (pred.float() + torch.where(alpha == 0, 0.0, change)).to(pred.dtype)
        state = x.detach().float()
        a, b = (value.to(x.device) for value in _following(scheduler, index))
        numerator = {"epsilon": a, "v": a * alpha + b * sigma, "flow": a + b, "sample": -b}[kind]
        move = learner.displaced(state, gradient, score, at=at) - state
        return (pred.float() + numerator / (b * alpha - a * sigma) * move).to(pred.dtype)

    def _score(
        self,
        learner: LearnerGradient,
        pred_cond: Tensor,
        pred_uncond: Tensor | None,
        channels: int,
        kind: Prediction,
    ) -> Tensor | None:
        """Returns the label's score for an anchor; None without one, and in a step that has
        none.
        """
        anchor = learner.guidance.anchor
        if not anchor:
            return None
        if pred_uncond is None:
            if math.isclose(self.guidance_scale, 0.0 if self.use_original_formulation else 1.0):
                raise no_anchor(anchor, "the guider has no classifier-free guidance")
            return None
        return label_score(pred_cond[:, :channels], pred_uncond[:, :channels], kind)

    @staticmethod
    def _differentiated(
        learner: LearnerGradient,
        x: Tensor,
        prediction: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        kind: Prediction,
    ) -> Tensor:
        """Returns d criterion / d x through the recorded forward (x0 is the border of the two
        graphs).
        """
        labels = learner.labels_for(x)
        path = learner.path(x.detach().float(), labels)
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            x0 = predict_x0(leaf.float(), prediction[:, : x.shape[1]], alpha, sigma, kind)
        return path.at_recorded(x0, leaf, labels)[1].float()


def _following(scheduler: Any, index: int) -> tuple[Tensor, Tensor]:
    """Returns the solver's a and b of a step: x_next = a x0 + b eps."""
    if is_flow(scheduler):
        then = scheduler.sigmas[index + 1].float()
        return 1 - then, then
    plain = diffusers.DDIMScheduler.from_config(scheduler.config)
    row = ddim_table(plain, scheduler.num_inference_steps).rows[index]
    return row[2], row[3]
