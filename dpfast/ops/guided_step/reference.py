"""`guided_step` in plain PyTorch; the formula stands in ``__init__``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.ops import noise

NORM_FLOOR = 1e-8
SHORTEST = 2.0**-5  # a |d| below this is not stretched to length 1, but by 32
STRONGEST = 2.0**40  # a kappa above turns d no further in fp32, and its square may overflow
SMALLEST = 2.0**-126  # a squared norm below it, fp32's smallest normal number, counts as zero


class Options(NamedTuple):
    """The options that select a variant of the step, in the types that a registered operation
    takes.
    """

    mode: str
    prediction: str
    clip: float  # infinite for none
    threshold_ratio: float  # negative for no dynamic threshold
    threshold_maximum: float


class Call(NamedTuple):
    """The checked arguments of one step, and where its results go."""

    out: Tensor
    x0_out: Tensor | None
    skipped: Tensor | None
    x: Tensor
    pred_cond: Tensor
    pred_uncond: Tensor | None
    grad: Tensor | None
    x0_prev: Tensor | None
    table: Tensor
    step: int | Tensor
    cfg_scale: float | Tensor
    omega: float | Tensor
    anchor: float | Tensor | None  # where it is not None, so are pred_uncond and grad
    options: Options
    sample_ids: Tensor | None
    seed: int | Tensor

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.x, self.pred_cond, self.pred_uncond, self.grad, self.x0_prev

    def deliver(self, results: Sequence[Tensor | None]) -> None:
        """Copies x_next and x0 to `out` and `x0_out` where a kernel could not write them there."""
        for wanted, result in zip((self.out, self.x0_out), results, strict=True):
            if wanted is not None and result is not None and result is not wanted:
                wanted.copy_(result)


def _row(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Returns a scalar as it is, a (B,) tensor as (B, 1)."""
    return value.to(like.dtype).reshape(-1, 1) if isinstance(value, Tensor) else value


def _reciprocal(value: Tensor) -> Tensor:
    return torch.where(value == 0, 0.0, 1.0 / value)


def _clipped(x0: Tensor, options: Options) -> Tensor:
    if options.threshold_ratio < 0:
        return x0 if math.isinf(options.clip) else x0.clamp(-options.clip, options.clip)
    bound = quantile(x0.abs(), options.threshold_ratio).clamp(1.0, options.threshold_maximum)
    return torch.minimum(torch.maximum(x0, -bound), bound) / bound


def quantile(values: Tensor, ratio: float) -> Tensor:
    """Returns the quantile of each row, linear between its neighbours: (B, n) -> (B, 1)."""
    position = ratio * (values.shape[1] - 1)
    below = math.floor(position)
    largest = values.topk(values.shape[1] - below, dim=1).values
    low = torch.where(values.isnan().any(dim=1, keepdim=True), torch.nan, largest[:, -1:])
    high = largest[:, -2:-1] if below + 1 < values.shape[1] else low
    return low + (position - below) * (high - low)


def reference(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the formula in plain PyTorch, fp32 inside (fp64 for an fp64 x): x_next and x0, in the
    dtype of x.
    """
    x = call.x
    table = call.table
    step = call.step
    options = call.options
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

    state, pred = flat(x), flat(call.pred_cond)
    difference: Tensor | None = None
    if call.pred_uncond is not None:
        base = flat(call.pred_uncond)
        difference = pred - base
        pred = base + _row(call.cfg_scale, state) * difference
    shift: Tensor | None = None
    if call.grad is not None:
        gradient = flat(call.grad)
        squares = gradient.square().sum(dim=1, keepdim=True)
        finite = squares.float().isfinite()
        kappa = None if call.anchor is None else _row(call.anchor, state)
        if kappa is not None:
            assert difference is not None
            label = difference if options.prediction == "sample" else -difference
            label_squares = label.square().sum(dim=1, keepdim=True)
            finite = finite & ((kappa == 0) | label_squares.float().isfinite())
        gradient = torch.where(finite, gradient, 0.0)
        squares = torch.where(finite, squares, 0.0)
        if call.skipped is not None:
            call.skipped.add_((~finite).sum())
        if options.mode == "relative":
            norm = state.square().sum(dim=1, keepdim=True).sqrt()
            weight = _row(call.omega, state) * norm / (squares.sqrt() + NORM_FLOOR)
        else:
            weight = _row(call.omega, state) * sigma
        move = weight * gradient
        if kappa is not None:
            anchored = (kappa != 0) & (squares >= SMALLEST) & (label_squares >= SMALLEST)
            ratio = squares.sqrt() / label_squares.sqrt()
            if options.mode == "relative":
                if isinstance(kappa, Tensor):
                    kappa = kappa.clamp(max=STRONGEST)
                else:
                    kappa = min(kappa, STRONGEST)
                cosine = (gradient * label).sum(dim=1, keepdim=True) / squares.sqrt()
                cosine = (cosine / label_squares.sqrt()).clamp(-1.0, 1.0)
                length = ((1 - kappa) ** 2 + 2 * kappa * (1 + cosine)).sqrt()
                weight = weight / length.clamp(min=SHORTEST)
            move = torch.where(anchored, weight * (gradient + kappa * ratio * label), move)
        if options.mode == "relative":
            state = state + move
        else:
            shift = move

    if options.prediction == "epsilon":
        x0, eps = (state - sigma * pred) * _reciprocal(alpha), pred
    elif options.prediction == "v":
        x0, eps = alpha * state - sigma * pred, sigma * state + alpha * pred
    elif options.prediction == "sample":
        x0, eps = pred, (state - alpha * pred) * _reciprocal(sigma)
    else:
        x0, eps = state - sigma * pred, state + alpha * pred
    if shift is not None:
        x0, eps = x0 + sigma * _reciprocal(alpha) * shift, eps - shift
    x0 = _clipped(x0, options)
    following = a * x0 + b * eps
    if call.x0_prev is not None:
        following = following + c * flat(call.x0_prev)
    if call.sample_ids is not None:
        z = noise.reference(call.sample_ids, (following.shape[1],), call.seed, step + 1)
        following = following + d * z
    return following.to(x.dtype).reshape(x.shape), x0.to(x.dtype).reshape(x.shape)
