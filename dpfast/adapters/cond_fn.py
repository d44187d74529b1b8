"""``cond_fn`` as guided-diffusion (Dhariwal and Nichol, 2021) and its descendants call it.

Their samplers take ``cond_fn(x, t, **model_kwargs)`` for the gradient of a log-probability with
respect to x: ancestral sampling goes to ``mean + variance * cond_fn``, DDIM to ``eps - sigma *
cond_fn`` with sigma = sqrt(1 - alpha bar). Both ascend. Here the log-probability is omega H, so
positive omega raises the entropy and makes hard
samples: it is mode="score" of ``dpfast.guided_step``. Do not negate it: Eq. 7 of arXiv 2502.15588
prints eps + omega grad H, which would lower the entropy; its Algorithm 1 ascends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from dpfast.adapters.gradient import LearnerGradient, Network, no_anchor
from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.ops.guided_step import Prediction


class CondFn:
    """The guidance function that ``make_cond_fn`` returns: the gradient of a noisy batch."""

    def __init__(
        self,
        model: Network,
        gradient: LearnerGradient,
        alphas_cumprod: Tensor,
        prediction: Prediction,
    ) -> None:
        self.model = model
        self.gradient = gradient
        self.alphas_cumprod = alphas_cumprod
        self.prediction = prediction

    @property
    def skipped(self) -> int:
        """The number of gradients of single samples that were not finite, and are zero."""
        return self.gradient.skipped

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, **model_kwargs: Tensor
    ) -> Tensor:
        """Returns omega d criterion / d x, (B, c, h, w) in x's dtype.

        Args:
            x: (B, c, h, w) noisy latents.
            t: (B,) trained timesteps.
            y: (B,) class ids, or None.
            **model_kwargs: Further arguments of the model.

        Raises:
            InputError: For other shapes.
        """
        if x.dim() != 4:
            raise InputError(f"x has shape {tuple(x.shape)}, expected (B, c, h, w)")
        if not isinstance(t, Tensor) or t.shape != (len(x),):
            raise InputError(
                f"t has shape {tuple(getattr(t, 'shape', ()))}, "
                f"expected one timestep a sample: ({len(x)},)"
            )
        if y is not None and y.shape != (len(x),):
            raise InputError(
                f"y has shape {tuple(y.shape)}, expected one class id a sample: ({len(x)},)"
            )
        self.alphas_cumprod = self.alphas_cumprod.to(x.device)
        level = self.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        condition = model_kwargs if y is None else {"y": y, **model_kwargs}
        gradient, _ = self.gradient(
            x,
            t,
            level.sqrt(),
            (1 - level).sqrt(),
            network=self.model,
            prediction=self.prediction,
            condition=condition,
            labels=y,
        )
        config, trained = self.gradient.guidance, len(self.alphas_cumprod)
        done = 1 - (t.float() + 1) / trained
        inside = ((done >= config.start) & (done < config.until)).view(-1, 1, 1, 1)
        return (config.omega * torch.where(inside, self.gradient.finite(gradient), 0.0)).to(x.dtype)


def make_cond_fn(
    model: Network,
    learner: Callable[[Tensor], Tensor],
    alphas_cumprod: Tensor | Sequence[float],
    *,
    guidance: GuidanceConfig | None = None,
    decoder: Any = None,
    prediction: Prediction = "epsilon",
    image_size: tuple[int, int] | None = None,
    chunk: int | None = None,
) -> CondFn:
    """Returns the ``cond_fn`` of a learner of clean images.

    The learner sees the model's prediction of x0 in place of a noisy x.

    Args:
        model: Function ``model(x, t, y=y, **model_kwargs)`` to its prediction; a learned variance
            behind it is cut off.
        learner: As in ``dpfast.adapters.gradient.LearnerGradient``.
        alphas_cumprod: (T,) of the trained grid, as in ``GaussianDiffusion.alphas_cumprod`` before
            respacing.
        guidance: Configuration with mode="score" and every=1 (a ``cond_fn`` knows no step index);
            start and until are fractions of the T timesteps; anchor=0, there is no unconditional
            prediction, and no schedules. None: omega = 1.
        decoder: As in ``LearnerGradient``; None for pixels.
        prediction: "epsilon", "v" or "sample".
        image_size: As in ``LearnerGradient``.
        chunk: As in ``LearnerGradient``.

    Raises:
        InputError: For a guidance, a prediction or an ``alphas_cumprod`` that cannot work.
        TypeError: For an argument of another type.

    Examples:
        >>> import torch
        >>> from dpfast import make_cond_fn
        >>> learner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
        >>> cond_fn = make_cond_fn(lambda x, t: 0.1 * x, learner, torch.linspace(0.99, 0.01, 10))
        >>> cond_fn(torch.ones(2, 1, 8, 8), torch.tensor([4, 4])).shape
        torch.Size([2, 1, 8, 8])
    """
    guidance = guidance or GuidanceConfig(omega=1.0, every=1, mode="score")
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__}, expected a function of x, t and y")
    gradient = LearnerGradient(
        learner=learner, guidance=guidance, decoder=decoder, image_size=image_size, chunk=chunk
    )
    if guidance.mode != "score" or guidance.every != 1:
        raise InputError(
            f"guidance has mode = {guidance.mode!r}, "
            f"every = {guidance.every}: expected 'score' and 1"
        )
    if guidance.anchor:
        raise no_anchor(guidance.anchor, "a cond_fn has the conditional prediction alone")
    for name in ("omega_schedule", "anchor_schedule"):
        if getattr(guidance, name):
            raise InputError(
                f"guidance has {name} = {getattr(guidance, name)!r}: expected (), a cond_fn knows "
                "no step index"
            )
    if prediction not in get_args(Prediction) or prediction == "flow":
        raise InputError(f"prediction = {prediction!r}: expected 'epsilon', 'v' or 'sample'")
    levels = torch.as_tensor(alphas_cumprod, dtype=torch.float32)
    if levels.dim() != 1 or not len(levels) or not bool(((levels > 0) & (levels <= 1)).all()):
        raise InputError(
            f"alphas_cumprod has shape {tuple(levels.shape)}, expected (T,) with values in (0, 1]"
        )
    return CondFn(model, gradient, levels, prediction)
