"""Guidance: the gradient of a criterion on the learner's logits with respect to a noisy latent.

    x0 = predict_x0(x, denoiser(x, t, label)) -> decode -> resize -> learner -> logits -> criterion
    -> vjp back to x

The conditional forward of classifier-free guidance is the one that is differentiated, so guidance
costs no extra denoiser forward (the predecessor ran one more per guided step). The direction is
ascent: Eq. 7 of arXiv 2502.15588 prints the opposite sign, its Algorithm 1 and the predecessor's
code ascend.

What classifier-free guidance has computed is the gradient of the generator's own belief in the
label, up to a positive factor. With an anchor a step ascends both (``dpfast.ops.guided_step``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dpfast import ops
from dpfast.errors import InputError
from dpfast.generate import check, criteria
from dpfast.generate.criteria import Criterion
from dpfast.generate.models.decoder import Decoder
from dpfast.generate.models.denoiser import Denoiser, predict
from dpfast.generate.resizing import resize
from dpfast.ops.guided_step import Mode, Prediction

Through = Literal["denoiser", "latent"]


def interval_steps(total: int, start: float, stop: float, every: int = 1) -> range:
    """Returns the steps i = first, first + every, ... with start <= i / total < stop."""
    first, last = (math.ceil(part * total - 1e-9) for part in (start, stop))  # 0.3 * 10 > 3
    return range(first, last, every)


Schedule = Sequence[tuple[float, float]]


def factors(schedule: Schedule, total: int) -> list[float]:
    """Returns the factor of each of ``total`` steps, on the straight lines between the points
    (fraction of the steps, factor) of a schedule, of which the first and the last one hold before
    and behind; 1 without points. Step i is at the fraction i / total, as in ``interval_steps``.
    """
    if not schedule:
        return [1.0] * total
    at, values = zip(*schedule, strict=True)
    found: list[float] = np.interp(np.arange(total) / total, at, values).tolist()
    return found


def cfg_steps(interval: tuple[float, float], schedule: Schedule, total: int) -> frozenset[int]:
    """Returns the indices of the steps with classifier-free guidance among ``total``: those in an
    interval whose factor is not 0.
    """
    factor = factors(schedule, total)
    return frozenset(i for i in interval_steps(total, *interval) if factor[i])


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """The strength, the steps and the criterion of guidance by a learner.

    Args:
        omega: In "relative" mode the displacement of a latent per guided step as a fraction of its
            norm; in "score" mode the factor of Algorithm 1 of arXiv 2502.15588. Positive raises the
            criterion ("hard" samples), negative lowers it ("easy" ones).
        every: Every so many of the steps in [start, until) one is guided; the count begins with the
            first step inside.
        start: Begin of the guided part, a fraction of the trajectory.
        until: End of the guided part, a fraction of the trajectory.
        mode: "relative" or "score", as ``omega`` says.
        through: "denoiser" is exact. "latent" holds the prediction fixed, so that the denoiser has
            no backward pass: an approximation, whose gradient sees x only where predict_x0 does.
        criterion: "entropy", "loss", "margin", "disagreement", or a function
            (``dpfast.generate.criteria``).
        anchor: kappa, the weight of the generator's own label score beside the criterion's
            gradient, both of length 1; 0: the paper's guidance. In "relative" mode the move is as
            long as without one, in "score" mode up to 1 + kappa times as long. A guided step
            without classifier-free guidance has no such score, and is the paper's. Only where
            omega raises the criterion.
        omega_schedule: Factors of omega by step, pairs (fraction of the steps, factor of at least
            0) as in ``dpfast.generate.guidance.factors``; (): 1 in all. A step in which the factor
            is 0 is unguided, and costs what such a step costs.
        anchor_schedule: Factors of the anchor by step, as ``omega_schedule``.

    Raises:
        InputError: For a value out of range.
        TypeError: For a value of another kind.

    Examples:
        >>> import dpfast
        >>> sorted(dpfast.GuidanceConfig(omega=0.05, every=5).steps(20))
        [0, 5, 10, 15]
    """

    omega: float = 0.05
    every: int = 3
    start: float = 0.0
    until: float = 1.0
    mode: Mode = "relative"
    through: Through = "denoiser"
    criterion: str | Criterion = "entropy"
    anchor: float = 0.0
    omega_schedule: Schedule = ()
    anchor_schedule: Schedule = ()

    def __post_init__(self) -> None:
        check.number("omega", self.omega)
        check.count("every", self.every, "at least 1, which guides every step")
        check.number("start", self.start)
        check.number("until", self.until)
        check.interval("(start, until)", self.start, self.until)
        for name, value, known in (("mode", self.mode, Mode), ("through", self.through, Through)):
            if value not in get_args(known):
                raise InputError(
                    f"{name} = {value!r}: expected one of {', '.join(get_args(known))}"
                )
        criteria.named(self.criterion)
        check.at_least_zero("anchor", self.anchor)
        check.schedule("omega_schedule", self.omega_schedule)
        check.schedule("anchor_schedule", self.anchor_schedule)
        if self.anchor and self.omega < 0:
            raise InputError(
                f"anchor = {self.anchor:g}: expected 0 with omega = {self.omega:g}, which lowers "
                "the criterion"
            )

    def steps(self, total: int) -> frozenset[int]:
        """Returns the indices of the guided steps among ``total``, whatever omega is."""
        factor = factors(self.omega_schedule, total)
        inside = interval_steps(total, self.start, self.until, self.every)
        return frozenset(i for i in inside if factor[i])

    def at(self, step: int, total: int) -> tuple[float, float]:
        """Returns omega and anchor in step ``step`` of ``total``, their schedules applied."""
        factor = [
            factors(each, total)[step] for each in (self.omega_schedule, self.anchor_schedule)
        ]
        return self.omega * factor[0], self.anchor * factor[1]

    def check_steps(self, total: int) -> None:
        """Checks that some of ``total`` steps is guided.

        Raises:
            InputError: Where none is.
        """
        if not interval_steps(total, self.start, self.until, self.every):
            raise InputError(
                f"(start, until) = ({self.start:g}, {self.until:g}): none of the {total} steps "
                "begins there, so none would be guided; expected at least one"
            )
        if not self.steps(total):
            raise InputError(
                f"omega_schedule = {self.omega_schedule!r}: its factor is 0 in all of the {total} "
                "steps that may be guided; expected another one in at least one"
            )


def predict_x0(x: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """Returns x0 from a denoiser's prediction of ``kind`` "epsilon", "v", "sample" or "flow"; all
    of shape (B, c, h, w).
    """
    prediction = prediction.to(x.dtype)
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    if kind == "v":
        return alpha * x - sigma * prediction
    if kind == "flow":
        return x - sigma * prediction
    return prediction


@dataclass(frozen=True, kw_only=True)
class LearnerPath:
    """The way from a denoised latent to the criterion, and back.

    decoder: the tiny one where there is one.
    learner: images in [-1, 1] to logits (B, K), or (B, M, K) of a committee for a criterion that
    compares its members.
    image_size: (H, W) that the learner takes; None: the decoder's.
    """

    decoder: Decoder
    learner: Callable[[Tensor], Tensor]
    criterion: Criterion = criteria.entropy
    image_size: tuple[int, int] | None = None

    def logits(self, images: Tensor) -> Tensor:
        """Returns the learner's logits of images (B, C, H, W) in [-1, 1], resized to what it
        takes.
        """
        if self.image_size is not None and images.shape[-2:] != self.image_size:
            images = resize(images, self.image_size)
        return self.learner(images)

    def entropy(self, images: Tensor) -> Tensor:
        """Returns the entropy (B,) of the learner's prediction, nats; of a committee that of its
        first member.
        """
        logits = self.logits(images)
        return ops.entropy(logits[:, 0] if logits.dim() == 3 else logits)

    def at(self, x0: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the criterion's values (B,) at x0, and their gradient there."""
        logits, backward = torch.func.vjp(lambda x0: self.logits(self.decoder(x0)), x0)  # type: ignore[misc]
        value, dlogits = criteria.value_and_gradient(self.criterion, logits, labels)
        return value, backward(dlogits)[0]

    @torch.no_grad()
    def at_recorded(self, x0: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the criterion's values (B,) at x0, and their gradient at the leaf x from which
        autograd recorded x0.
        """
        value, dx0 = self.at(x0.detach(), labels)
        with torch.inference_mode(False):
            (gradient,) = torch.autograd.grad(x0, x, dx0)
        return value, gradient


@dataclass(frozen=True, kw_only=True)
class GuidancePath(LearnerPath):
    """The way from a noisy latent to the criterion, and back.

    denoiser: of the conditional prediction. through: as in ``GuidanceConfig``.

    ``dpfast.generate.bounded`` holds less memory for the same numbers.
    """

    denoiser: Denoiser
    through: Through = "denoiser"

    def gradient(
        self,
        x: Tensor,
        timestep: Tensor,
        labels: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        prediction: Tensor | None = None,
        conditions: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradient of the criterion at x, and the prediction that it shares with
        classifier-free guidance.

        Args:
            x: latents (B, c, h, w), float32.
            timestep: 0-d, or (B,), of the step's table row.
            labels: (B,) int64 class ids.
            alpha, sigma: 0-d, or (B, 1, 1, 1), of the step's table row.
            prediction: the conditional prediction (B, c, h, w), held fixed; None: it is made, and
                differentiated.
            conditions: (B,) int64 ids that the denoiser is asked by; None: the labels.
            scale: 0-d, of classifier-free guidance, for a denoiser that embeds it.

        Returns:
            gradient (B, c, h, w), prediction (B, c, h, w) and value (B,) of the criterion.
        """
        asked = labels if conditions is None else conditions

        def x0_of(x: Tensor) -> tuple[Tensor, Tensor]:
            made = prediction
            if made is None:
                made = predict(self.denoiser, x, timestep, asked, scale)
            return predict_x0(x, made, alpha, sigma, self.denoiser.prediction), made

        with torch.no_grad():  # the learner's own weights need no graph; vjp records what x needs
            x0, backward, made = torch.func.vjp(x0_of, x, has_aux=True)  # type: ignore[misc]
            value, dx0 = self.at(x0, labels)
            return backward(dx0)[0], made, value


def label_score(conditional: Tensor, unconditional: Tensor, prediction: Prediction) -> Tensor:
    """Returns the gradient of the generator's belief in the condition, (B, c, h, w) in float32 and
    up to a positive factor, of the two predictions of classifier-free guidance.
    """
    more = conditional.float() - unconditional.float()
    return more if prediction == "sample" else -more
