"""Entropy guidance: the gradient of the learner's prediction entropy with respect to a noisy latent.

    x0 = predict_x0(x, denoiser(x, t, label)) -> decode -> learner -> logits -> (H, dH/dlogits) -> vjp back to x

The conditional forward of classifier-free guidance is the one that is differentiated, so guidance costs no extra
denoiser forward (the predecessor ran one more per guided step). The direction is ascent: Eq. 7 of arXiv 2502.15588
prints the opposite sign, its Algorithm 1 and the predecessor's code ascend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.generate.decoder import Decoder
from dpfast.generate.denoiser import Denoiser
from dpfast.ops import entropy_and_grad
from dpfast.ops.guided_step import Mode

Criterion = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits (B, K) -> value (B,), gradient (B, K)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """When and how strongly a learner guides.

    ``omega``: in "relative" mode the displacement of a latent per guided step as a fraction of its norm; in "score"
    mode the factor of Algorithm 1. Positive raises entropy ("hard" samples), negative lowers it.
    Guided are the steps 0, every, 2 every, ... below ``until`` x steps.
    """

    omega: float = 0.05
    every: int = 3
    until: float = 1.0
    mode: Mode = "relative"

    def steps(self, total: int) -> frozenset[int]:
        """The indices of the guided steps among ``total``."""
        return (
            frozenset(i for i in range(0, total, self.every) if i < self.until * total) if self.omega else frozenset()
        )


def predict_x0(x: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """x0 from a denoiser's prediction of ``kind`` "epsilon", "v", "sample" or "flow"; all of shape (B, c, h, w)."""
    if kind == "epsilon":
        return (x - sigma * prediction) / alpha
    if kind == "v":
        return alpha * x - sigma * prediction
    if kind == "flow":
        return x - sigma * prediction
    return prediction


def entropy_gradient(
    x: Tensor,
    timestep: Tensor,
    labels: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    denoiser: Denoiser,
    decoder: Decoder,
    learner: Callable[[Tensor], Tensor],
    image_size: tuple[int, int] | None = None,
    criterion: Criterion = entropy_and_grad,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``criterion`` at x0, and the prediction that it shares with classifier-free guidance.

    Args:
        x: latents (B, c, h, w), float32.
        timestep: 0-d tensor; labels: (B,) int64 class ids.
        alpha, sigma: 0-d tensors of the step's table row.
        learner: images in [-1, 1] to logits (B, K).
        image_size: (H, W) that the learner takes; None: the decoder's.

    Returns:
        gradient (B, c, h, w), prediction (B, c, h, w) and value (B,) of the criterion. Samples do not mix.
    """

    def logits_of(x: Tensor) -> tuple[Tensor, Tensor]:
        prediction = denoiser(x, timestep, labels)
        images = decoder(predict_x0(x, prediction, alpha, sigma, denoiser.prediction))
        if image_size is not None and images.shape[-2:] != image_size:
            images = F.interpolate(images, image_size, mode="bilinear", antialias=True)
        return learner(images), prediction

    with torch.no_grad():  # keeps the learner's own weights out of the graph; vjp records what x needs
        logits, backward, prediction = torch.func.vjp(logits_of, x, has_aux=True)  # type: ignore[misc]
        value, dlogits = criterion(logits)
        (gradient,) = backward(dlogits)
    return gradient, prediction, value
