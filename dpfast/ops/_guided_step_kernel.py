"""The Triton kernel of `guided_step`; formula and public function stand in guided_step.py.

A sample of up to 16,384 elements belongs to one program, which keeps x and the gradient in registers while it sums
their squares: each tensor is read once. They are held as chunks, so that the predictions need registers for one chunk.
A longer sample is split over programs: a first kernel leaves partial sums, the second adds them up and makes the step.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# ruff: noqa: RUF005 (kernels know no unpacking of tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.ops._triton import next_power, tl, triton
from dpfast.ops.noise import normals

WHOLE = 16384  # elements of a sample that one program holds
WITH_QUANTILE = 8192  # elements of a sample whose quantile one program finds
SPLIT = 4096  # elements a program of a longer sample
PREDICTIONS = {"epsilon": 0, "v": 1, "sample": 2, "flow": 3}
PADDING = tl.constexpr(0x7FFFFFFF)  # the bits of lanes past the end, above those of any value that arithmetic makes
LARGEST = tl.constexpr(3.4028234663852886e38)


class Limit(NamedTuple):
    """How x0 is limited: `kind` 0 not at all, 1 at `bound`, 2 at a quantile found on chip, 3 at given bounds (B,)."""

    kind: int
    bound: float | Tensor = 0.0
    below: int = 0
    fraction: float = 0.0
    maximum: float = 1.0


@triton.jit
def norms_kernel(x, grad, partials, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of squares of one block of a sample: partials (B, blocks, 2)."""
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < ELEMENTS
    state = tl.load(x + sample * ELEMENTS + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(grad + sample * ELEMENTS + at, mask=inside, other=0.0).to(tl.float32)
    target = partials + (sample * tl.num_programs(1) + part) * 2
    tl.store(target, tl.sum(state * state, axis=0))
    tl.store(target + 1, tl.sum(gradient * gradient, axis=0))


@triton.jit
def _reciprocal(value):
    return tl.where(value == 0.0, 0.0, 1.0 / value)


@triton.jit
def _bits(value):
    return tl.abs(value).to(tl.int32, bitcast=True)


@triton.jit
def _count_below(x0s, limit, CHUNKS: tl.constexpr):
    total = tl.zeros((), tl.int32)
    for i in tl.static_range(CHUNKS):
        total += tl.sum((_bits(x0s[i]) < limit).to(tl.int32), axis=0)
    return total


@triton.jit
def _quantile(x0s, below, fraction, PADDING: tl.constexpr, CHUNKS: tl.constexpr):
    """Between the values number `below` and `below + 1` of |x0|, whose bits order as integers do."""
    found = tl.zeros((), tl.int32)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        found = tl.where(_count_below(x0s, found | bit, CHUNKS) <= below, found | bit, found)
        bit = bit >> 1
    following = tl.full((), PADDING, tl.int32)
    broken = tl.zeros((), tl.int32)
    for i in tl.static_range(CHUNKS):
        bits = _bits(x0s[i])
        following = tl.minimum(following, tl.min(tl.where(bits > found, bits, PADDING), axis=0))
        broken += tl.sum(((bits > 0x7F800000) & (bits < PADDING)).to(tl.int32), axis=0)
    repeated = _count_below(x0s, found + 1, CHUNKS) > below + 1
    low = found.to(tl.float32, bitcast=True)
    high = tl.where(repeated | (fraction == 0.0), low, following.to(tl.float32, bitcast=True))
    return tl.where(broken > 0, float("nan"), low + fraction * (high - low))


@triton.jit
def _following(
    x0, eps, at, inside, a, b, c, d, x0_prev, x0_out, out, ids, sample, noise_at, seed, stream, BLOCK: tl.constexpr
):
    """x_next from x0 and eps, and both stores; `at` counts from the first sample, `noise_at` from this one."""
    result = a * x0 + b * eps
    if x0_prev is not None:
        result += c * tl.load(x0_prev + at, mask=inside, other=0.0).to(tl.float32)
    if ids is not None:
        result += d * normals(tl.load(ids + sample), noise_at, seed, stream, BLOCK)
    if x0_out is not None:
        tl.store(x0_out + at, x0.to(x0_out.dtype.element_ty), mask=inside)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["step", "seed", "steps", "below"])
def guided_step_kernel(
    x,
    pred_cond,
    pred_uncond,
    grad,
    x0_prev,
    out,
    x0_out,
    table,
    steps,
    step,
    cfg_scale,
    omega,
    ids,
    seed,
    skipped,
    partials,
    bound,
    below,
    fraction,
    maximum,
    ELEMENTS: tl.constexpr,
    STEP_AT: tl.constexpr,
    SEED_AT: tl.constexpr,
    CFG_STRIDE: tl.constexpr,
    OMEGA_STRIDE: tl.constexpr,
    RELATIVE: tl.constexpr,
    PREDICTION: tl.constexpr,
    LIMIT: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """CHUNKS * BLOCK elements of one sample a program. A tensor that is None drops its term at compile time.

    STEP_AT and SEED_AT: the argument is a pointer. CFG_STRIDE and OMEGA_STRIDE: 0 or 1 for a pointer, -1 for a number.
    PARTS: the partial sums of a split sample, rounded up to a power of two.
    """
    sample = tl.program_id(0).to(tl.int64)
    base = sample * ELEMENTS
    start = tl.program_id(1) * (CHUNKS * BLOCK)
    lane = tl.arange(0, BLOCK)

    row = (tl.load(step) if STEP_AT else step).to(tl.int64)
    legal = (row >= 0) & (row < steps)
    column = table + tl.where(legal, row, 0) * 6
    nowhere = tl.where(legal, 0.0, float("nan"))
    alpha, sigma = tl.load(column) + nowhere, tl.load(column + 1) + nowhere
    a, b = tl.load(column + 2) + nowhere, tl.load(column + 3) + nowhere
    c, d = tl.load(column + 4), tl.load(column + 5)
    scale = cfg_scale if CFG_STRIDE < 0 else tl.load(cfg_scale + sample * CFG_STRIDE)
    weight = omega if OMEGA_STRIDE < 0 else tl.load(omega + sample * OMEGA_STRIDE)
    key = (tl.load(seed) if SEED_AT else seed).to(tl.int64)

    states = ()
    gradients = ()
    state_squares = tl.zeros((), tl.float32)
    squares = tl.zeros((), tl.float32)
    for i in tl.static_range(CHUNKS):
        at = start + i * BLOCK + lane
        inside = at < ELEMENTS
        state = tl.load(x + base + at, mask=inside, other=0.0)
        states = states + (state,)
        if grad is not None:
            gradient = tl.load(grad + base + at, mask=inside, other=0.0)
            gradients = gradients + (gradient,)
            if partials is None:
                state_squares += tl.sum(state.to(tl.float32) * state.to(tl.float32), axis=0)
                squares += tl.sum(gradient.to(tl.float32) * gradient.to(tl.float32), axis=0)
    push = 0.0
    finite = True
    if grad is not None:
        if partials is not None:
            part = tl.arange(0, PARTS)
            source = partials + (sample * tl.num_programs(1) + part) * 2
            state_squares = tl.sum(tl.load(source, mask=part < tl.num_programs(1), other=0.0), axis=0)
            squares = tl.sum(tl.load(source + 1, mask=part < tl.num_programs(1), other=0.0), axis=0)
        finite = squares <= LARGEST
        push = weight * (tl.sqrt(state_squares) / (tl.sqrt(squares) + 1e-8) if RELATIVE else sigma)
        if skipped is not None:
            tl.atomic_add(skipped, 1, mask=(start == 0) & ((squares > LARGEST) | (squares != squares)), sem="relaxed")

    x0s = ()
    epss = ()
    for i in tl.static_range(CHUNKS):
        at = start + i * BLOCK + lane
        inside = at < ELEMENTS
        state = states[i].to(tl.float32)
        pred = tl.load(pred_cond + base + at, mask=inside, other=0.0).to(tl.float32)
        if pred_uncond is not None:
            uncond = tl.load(pred_uncond + base + at, mask=inside, other=0.0).to(tl.float32)
            pred = uncond + scale * (pred - uncond)
        if grad is not None:
            # A choice, not a product: zero times NaN is NaN.
            shift = tl.where(finite, push * gradients[i].to(tl.float32), 0.0)
            if RELATIVE:
                state += shift
        if PREDICTION == 0:
            x0, eps = (state - sigma * pred) * _reciprocal(alpha), pred
        elif PREDICTION == 1:
            x0, eps = alpha * state - sigma * pred, sigma * state + alpha * pred
        elif PREDICTION == 2:
            x0, eps = pred, (state - alpha * pred) * _reciprocal(sigma)
        else:
            x0, eps = state - sigma * pred, state + alpha * pred
        if grad is not None and not RELATIVE:
            x0 += sigma * _reciprocal(alpha) * shift
            eps -= shift
        if LIMIT == 2:
            padding = tl.full((BLOCK,), PADDING, tl.int32).to(tl.float32, bitcast=True)
            x0s = x0s + (tl.where(inside, x0, padding),)
            epss = epss + (eps,)
        else:
            if LIMIT == 1:
                x0 = tl.where(x0 > bound, bound, tl.where(x0 < -bound, -bound, x0))
            elif LIMIT == 3:
                limit = tl.load(bound + sample)
                x0 = tl.where(x0 > limit, limit, tl.where(x0 < -limit, -limit, x0)) * (1.0 / limit)
            _following(
                x0,
                eps,
                base + at,
                inside,
                a,
                b,
                c,
                d,
                x0_prev,
                x0_out,
                out,
                ids,
                sample,
                start + i * BLOCK,
                key,
                row + 1,
                BLOCK,
            )
    if LIMIT == 2:
        limit = _quantile(x0s, below, fraction, PADDING, CHUNKS)
        limit = tl.where(limit < 1.0, 1.0, tl.where(limit > maximum, maximum, limit))
        for i in tl.static_range(CHUNKS):
            at = start + i * BLOCK + lane
            x0 = x0s[i]
            x0 = tl.where(x0 > limit, limit, tl.where(x0 < -limit, -limit, x0)) * (1.0 / limit)
            _following(
                x0,
                epss[i],
                base + at,
                at < ELEMENTS,
                a,
                b,
                c,
                d,
                x0_prev,
                x0_out,
                out,
                ids,
                sample,
                start + i * BLOCK,
                key,
                row + 1,
                BLOCK,
            )


def settings(elements: int, itemsize: int, quantile: bool = False) -> tuple[int, int, int]:
    """Chunks, elements of a chunk and warps of a program, for tensors whose narrowest item has `itemsize` bytes.

    A thread takes 16 bytes of each tensor and chunk. The search for a quantile leaves a thread registers for half as
    many elements. The audit shows that no setting spills.
    """
    if elements > WHOLE:
        return 1, SPLIT, 8
    width = max(next_power(elements), 16)
    warps = min(max(width // (256 if quantile else 512), 1), 32)
    chunks = max(1, width // (warps * 32 * (16 // itemsize)))
    return chunks, width // chunks, warps


def launch(
    out: Tensor,
    x0_out: Tensor | None,
    skipped: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    table: Tensor,
    step: int | Tensor,
    cfg_scale: float | Tensor,
    omega: float | Tensor,
    relative: bool,
    prediction: str,
    limit: Limit,
    sample_ids: Tensor | None,
    seed: int | Tensor,
) -> None:
    """Writes contiguous `out` and `x0_out`; `inputs` are contiguous x, pred_cond, pred_uncond, grad and x0_prev."""
    samples, elements = out.shape[0], math.prod(out.shape[1:])
    if samples == 0:
        return
    x, pred_cond, pred_uncond, grad, x0_prev = inputs
    itemsize = min(tensor.element_size() for tensor in inputs if tensor is not None)
    chunks, block, warps = settings(elements, itemsize, limit.kind == 2)
    parts = -(-elements // (chunks * block))
    partials = None
    if parts > 1 and grad is not None:
        partials = torch.empty((samples, parts, 2), dtype=torch.float32, device=out.device)
        norms_kernel[(samples, parts)](x, grad, partials, elements, block, num_warps=warps)
    guided_step_kernel[(samples, parts)](
        x,
        pred_cond,
        pred_uncond,
        grad,
        x0_prev,
        out,
        x0_out,
        table.contiguous(),
        table.shape[0],
        step,
        cfg_scale,
        omega,
        sample_ids,
        seed,
        skipped,
        partials,
        limit.bound,
        limit.below,
        limit.fraction,
        limit.maximum,
        elements,
        isinstance(step, Tensor),
        isinstance(seed, Tensor),
        _stride(cfg_scale),
        _stride(omega),
        relative,
        PREDICTIONS[prediction],
        limit.kind,
        next_power(parts),
        chunks,
        block,
        num_warps=warps,
    )


def _stride(value: float | Tensor) -> int:
    return value.dim() if isinstance(value, Tensor) else -1
