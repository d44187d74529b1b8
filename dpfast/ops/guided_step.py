"""One step of a guided diffusion solver in one pass: CFG, guidance, the prediction of x0 and the update.

The solver is a table: a row (alpha, sigma, a, b, c, d) for each step, read on the device; x = alpha x0 + sigma eps.

    pred = pred_uncond + cfg_scale (pred_cond - pred_uncond)
    relative: x~ = x + omega |x| / (|g| + 1e-8) g        the norms are those of one sample
    score:    eps <- eps - omega sigma g                 an ascent; x0 follows: x0 <- x0 + omega sigma^2 / alpha g
    x0, eps:  epsilon: x0 = (x~ - sigma pred) / alpha    eps = pred
              v:       x0 = alpha x~ - sigma pred        eps = sigma x~ + alpha pred
              sample:  x0 = pred                         eps = (x~ - alpha pred) / sigma
              flow:    x0 = x~ - sigma pred              eps = x~ + alpha pred         (alpha = 1 - sigma)
    x_next = a clip(x0) + b eps + c x0_prev + d noise    eps is the one from before the clip

A division by a coefficient that is zero contributes zero (flow matching starts at alpha = 0). A sample whose gradient has
a squared norm that is not finite in fp32 takes its step unguided, and is counted. The noise of step t is
`normal(sample_ids, ..., stream=t + 1)`; stream 0 is left to the first latent.

Bytes for n elements of b bytes: 5 n b (x, pred_cond, pred_uncond, grad in, x_next out), n b more for x0_prev and for x0.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpfast.ops import _check, noise

Mode = Literal["relative", "score"]
Prediction = Literal["epsilon", "v", "sample", "flow"]
COLUMNS = 6
NORM_FLOOR = 1e-8


class DynamicThreshold(NamedTuple):
    """Imagen's dynamic threshold: s = quantile(|x0|, ratio) of a sample, within [1, maximum]; x0 is clamp(x0, -s, s) / s.

    Source: Saharia et al., "Photorealistic text-to-image diffusion models with deep language understanding" (2022).
    """

    ratio: float = 0.995
    maximum: float = 1.0


def _row(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A scalar as it is, a (B,) tensor as (B, 1)."""
    return value.to(like.dtype).reshape(-1, 1) if isinstance(value, Tensor) else value


def _reciprocal(value: Tensor) -> Tensor:
    return torch.where(value == 0, 0.0, 1.0 / value)


def _clipped(x0: Tensor, clip: float | DynamicThreshold | None) -> Tensor:
    if clip is None:
        return x0
    if not isinstance(clip, DynamicThreshold):
        return x0.clamp(-clip, clip)
    bound = quantile(x0.abs(), clip.ratio).clamp(1.0, clip.maximum)
    return torch.minimum(torch.maximum(x0, -bound), bound) / bound


def quantile(values: Tensor, ratio: float) -> Tensor:
    """The quantile of each row, linear between its neighbours: (B, n) -> (B, 1)."""
    position = ratio * (values.shape[1] - 1)
    below = math.floor(position)
    largest = values.topk(values.shape[1] - below, dim=1).values
    low = largest[:, -1:]
    high = largest[:, -2:-1] if below + 1 < values.shape[1] else low
    return low + (position - below) * (high - low)


def reference(
    x: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    grad: Tensor | None,
    table: Tensor,
    step: int | Tensor,
    cfg_scale: float | Tensor,
    omega: float | Tensor,
    mode: Mode,
    prediction: Prediction,
    clip: float | DynamicThreshold | None,
    x0_prev: Tensor | None,
    sample_ids: Tensor | None,
    seed: int | Tensor,
    skipped: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, fp32 inside (fp64 for an fp64 x): x_next and x0, in the dtype of x."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch = x.shape[0]

    def flat(tensor: Tensor) -> Tensor:
        return tensor.to(work).reshape(batch, math.prod(x.shape[1:]))

    if isinstance(step, Tensor):
        row = table.index_select(0, step.long().clamp(0, table.shape[0] - 1).reshape(1))[0]
        row = torch.where((step >= 0) & (step < table.shape[0]), row, torch.nan)
    else:
        row = table[step]
    alpha, sigma, a, b, c, d = row.to(work).unbind()

    state, pred = flat(x), flat(pred_cond)
    if pred_uncond is not None:
        base = flat(pred_uncond)
        pred = base + _row(cfg_scale, state) * (pred - base)
    shift: Tensor | None = None
    if grad is not None:
        gradient = flat(grad)
        squares = gradient.square().sum(dim=1, keepdim=True)
        finite = squares.float().isfinite()
        gradient = torch.where(finite, gradient, 0.0)
        if skipped is not None:
            skipped += (~finite).sum()
        if mode == "relative":
            squares = torch.where(finite, squares, 0.0)
            norm = state.square().sum(dim=1, keepdim=True).sqrt()
            state = state + _row(omega, state) * norm / (squares.sqrt() + NORM_FLOOR) * gradient
        else:
            shift = _row(omega, state) * sigma * gradient

    if prediction == "epsilon":
        x0, eps = (state - sigma * pred) * _reciprocal(alpha), pred
    elif prediction == "v":
        x0, eps = alpha * state - sigma * pred, sigma * state + alpha * pred
    elif prediction == "sample":
        x0, eps = pred, (state - alpha * pred) * _reciprocal(sigma)
    else:
        x0, eps = state - sigma * pred, state + alpha * pred
    if shift is not None:
        x0, eps = x0 + sigma * _reciprocal(alpha) * shift, eps - shift
    x0 = _clipped(x0, clip)
    following = a * x0 + b * eps
    if x0_prev is not None:
        following = following + c * flat(x0_prev)
    if sample_ids is not None:
        following = following + d * noise.reference(sample_ids, (following.shape[1],), seed, step + 1)
    return following.to(x.dtype).reshape(x.shape), x0.to(x.dtype).reshape(x.shape)


def _check_clip(clip: object) -> float | DynamicThreshold | None:
    if clip is None:
        return None
    if isinstance(clip, tuple):
        threshold = DynamicThreshold(*clip)
        if not (0 <= threshold.ratio <= 1 and threshold.maximum >= 1):
            raise ValueError(f"clip needs a ratio in [0, 1] and a maximum of at least 1, got {threshold}")
        return threshold
    if isinstance(clip, bool) or not isinstance(clip, (int, float)):
        raise TypeError(f"clip must be None, a number or a DynamicThreshold, got {type(clip).__name__}")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    return float(clip)


def guided_step(
    x: Tensor,
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    grad: Tensor | None,
    table: Tensor,
    step: int | Tensor,
    *,
    cfg_scale: float | Tensor,
    omega: float | Tensor,
    mode: Mode = "relative",
    prediction: Prediction = "epsilon",
    clip: float | DynamicThreshold | None = None,
    x0_prev: Tensor | None = None,
    sample_ids: Tensor | None = None,
    seed: int | Tensor = 0,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Tensor:
    """The state after one guided solver step, in x's shape and dtype.

    Args:
        x: (B, ...) fp32, fp16 or bf16: the state at this step.
        pred_cond: the network's output with the condition, x's shape, any of the three dtypes.
        pred_uncond: the output without it, or None for no classifier-free guidance.
        grad: the gradient of the guidance criterion with respect to x, or None for an unguided step.
        table: (steps, 6) fp32 on x's device, columns alpha, sigma, a, b, c, d.
        step: the row of the table; a Python integer, or a 0-d integer tensor that is read on the device.
        cfg_scale: diffusers' convention, 1 is the conditional prediction; number, 0-d or (B,) tensor.
        omega: strength of the guidance; number, 0-d or (B,) tensor.
        mode: "relative" moves the state by omega times its norm, "score" adds omega grad to the score.
        prediction: what the network predicts: "epsilon", "v", "sample" or "flow".
        clip: bound of |x0|, or a `DynamicThreshold`, or None.
        x0_prev: the x0 of the step before, for the table's column c; None drops the term.
        sample_ids: (B,) int64 keys of the noise for the table's column d; None drops the term.
        seed: seed of the noise; integer or 0-d tensor.
        out: where to write the result; may be x itself. x0_out: where to write the (clipped) x0; must not overlap.
        skipped: int64 counter of shape () or (1,), raised by the number of samples whose gradient was not finite.

    Returns:
        x_next: `out`, or a new contiguous tensor. A step tensor outside the table gives NaN.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape or device, an unknown option, a step outside the table.

    Source: Song et al., DDIM (2021); Lu et al., DPM-Solver++ (2022); Lipman et al., flow matching (2023).
    """
    _check.tensor("x", x, _check.FLOATS)
    if x.dim() < 2 or math.prod(x.shape[1:]) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, ...) with at least one element a sample")
    shape, device = tuple(x.shape), x.device
    named = {"pred_cond": pred_cond, "pred_uncond": pred_uncond, "grad": grad, "x0_prev": x0_prev}
    for name, value in named.items():
        if value is not None or name == "pred_cond":
            _check.shaped(name, _check.tensor(name, value, _check.FLOATS, device), shape)
    for name, value in {"out": out, "x0_out": x0_out}.items():
        if value is not None:
            _check.shaped(name, _check.tensor(name, value, (x.dtype,), device), shape)
    _check.tensor("table", table, (torch.float32,), device)
    if table.dim() != 2 or table.shape[1] != COLUMNS or table.shape[0] == 0:
        raise ValueError(f"table has shape {tuple(table.shape)}, expected (steps, {COLUMNS}) with steps >= 1")
    step = _check.integer("step", step, device)
    if isinstance(step, int) and not 0 <= step < table.shape[0]:
        raise ValueError(f"step must be in [0, {table.shape[0]}), the rows of the table, got {step}")
    cfg_scale = _check.per_sample("cfg_scale", cfg_scale, shape[0], device)
    omega = _check.per_sample("omega", omega, shape[0], device)
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if prediction not in get_args(Prediction):
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}")
    if sample_ids is not None:
        _check.shaped("sample_ids", _check.tensor("sample_ids", sample_ids, (torch.int64,), device), shape[:1])
    if skipped is not None and _check.tensor("skipped", skipped, (torch.int64,), device).numel() != 1:
        raise ValueError(f"skipped has shape {tuple(skipped.shape)}, expected ()")
    seed = noise.check_seed("seed", seed, device)
    threshold = _check_clip(clip)

    following, x0 = reference(
        x, pred_cond, pred_uncond, grad, table, step, cfg_scale, omega,
        mode, prediction, threshold, x0_prev, sample_ids, seed, skipped,
    )  # fmt: skip
    if x0_out is not None:
        x0_out.copy_(x0)
    return following if out is None else out.copy_(following)
