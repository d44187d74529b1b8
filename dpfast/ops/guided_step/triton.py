"""The Triton kernel of `guided_step`; the formula stands in ``__init__``.

A sample of up to 16,384 elements belongs to one program, which keeps x and the gradient in
registers while it sums their squares, then x0 and eps in their place: each tensor is read once.
With an anchor it sums over the predictions as well, and keeps them too up to 8,192 elements. For
more a multiprocessor has no registers (four tensors of 16,384 in fp32 are all of its 256 KiB), and
the predictions are read a second time, from the cache.
They are held as chunks, of which a thread loads 16 bytes at a time. A longer sample is split over
programs: a first kernel leaves partial sums, the second adds them up and makes the step.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# ruff: noqa: RUF005 (kernels know no unpacking of tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.ops import dispatch
from dpfast.ops.guided_step.reference import SHORTEST, SMALLEST, STRONGEST, Call, quantile
from dpfast.ops.noise import normals, wide
from dpfast.ops.triton_stub import next_power, tl, triton

WHOLE = 16384  # elements of a sample that one program holds
SPLIT = 4096  # elements a program of a longer sample
HELD = 8192  # elements of a sample whose predictions stay in registers too, with an anchor
PREDICTIONS = {"epsilon": 0, "v": 1, "sample": 2, "flow": 3}
INFINITY = tl.constexpr(0x7F800000)  # its bits
LARGEST = tl.constexpr(3.4028234663852886e38)
SMALLEST_SQUARES = tl.constexpr(SMALLEST)
SHORTEST_LENGTH = tl.constexpr(SHORTEST)
STRONGEST_ANCHOR = tl.constexpr(STRONGEST)


class Limit(NamedTuple):
    """The limit of x0: `kind` 0 not at all, 1 at `bound`, 2 at a quantile found on chip, 3 at given
    bounds (B,).
    """

    kind: int
    bound: float | Tensor = 0.0
    below: int = 0
    fraction: float = 0.0
    maximum: float = 1.0


@triton.jit
def norms_kernel(
    x, grad, pred_cond, pred_uncond, partials, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes sums of one block of a sample: partials (B, blocks, 2), those of squares. With
    predictions (B, blocks, 4), two more over their difference: of its squares, and along the
    gradient.
    """
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    inside = at < ELEMENTS
    state = tl.load(x + sample * ELEMENTS + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(grad + sample * ELEMENTS + at, mask=inside, other=0.0).to(tl.float32)
    SUMS: tl.constexpr = 2 if pred_cond is None else 4
    target = partials + (sample * tl.num_programs(1) + part) * SUMS
    tl.store(target, tl.sum(state * state, axis=0))
    tl.store(target + 1, tl.sum(gradient * gradient, axis=0))
    if pred_cond is not None:
        cond = tl.load(pred_cond + sample * ELEMENTS + at, mask=inside, other=0.0).to(tl.float32)
        uncond = tl.load(pred_uncond + sample * ELEMENTS + at, mask=inside, other=0.0)
        difference = cond - uncond.to(tl.float32)
        tl.store(target + 2, tl.sum(difference * difference, axis=0))
        tl.store(target + 3, tl.sum(difference * gradient, axis=0))


@triton.jit
def _reciprocal(value):
    return tl.where(value == 0.0, 0.0, 1.0 / value)


@triton.jit
def _sum_of_squares(chunks, CHUNKS: tl.constexpr):
    """Returns the sum of squares, added up by lane first: every sum over lanes is a barrier."""
    value = chunks[0].to(tl.float32)
    total = value * value
    for i in tl.static_range(1, CHUNKS):
        value = chunks[i].to(tl.float32)
        total += value * value
    return tl.sum(total, axis=0)


@triton.jit
def _label_sums(
    gradients,
    conds,
    unconds,
    pred_cond,
    pred_uncond,
    base,
    start,
    ELEMENTS: tl.constexpr,
    HOLD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns sums over the difference of the predictions: of its squares, and along the gradient.

    Each chunk is added up by fours, elements of one thread, which leaves it three registers more a
    sum.
    """
    squares = tl.zeros((BLOCK // 4,), tl.float32)
    along = tl.zeros((BLOCK // 4,), tl.float32)
    for i in tl.static_range(CHUNKS):
        if HOLD:
            cond, uncond = conds[i], unconds[i]
        else:
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            cond = tl.load(pred_cond + base + at, mask=at < ELEMENTS, other=0.0)
            uncond = tl.load(pred_uncond + base + at, mask=at < ELEMENTS, other=0.0)
        difference = cond.to(tl.float32) - uncond.to(tl.float32)
        squares += tl.sum(tl.reshape(difference * difference, (BLOCK // 4, 4)), axis=1)
        along += tl.sum(
            tl.reshape(difference * gradients[i].to(tl.float32), (BLOCK // 4, 4)), axis=1
        )
    return tl.sum(squares, axis=0), tl.sum(along, axis=0)


@triton.jit
def _partial(partials, sample, index, SUMS: tl.constexpr, PARTS: tl.constexpr):
    """Returns one of the sums of a split sample."""
    part = tl.arange(0, PARTS)
    source = partials + (sample * tl.num_programs(1) + part) * SUMS + index
    return tl.sum(tl.load(source, mask=part < tl.num_programs(1), other=0.0), axis=0)


@triton.jit
def _count_below(x0s, limit, CHUNKS: tl.constexpr):
    """Counts how many of |x0| are below a limit: the comparison takes the magnitude itself, so
    nothing but x0 is kept.
    """
    count = (tl.abs(x0s[0]) < limit).to(tl.int32)
    for i in tl.static_range(1, CHUNKS):
        count += (tl.abs(x0s[i]) < limit).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _quantile(x0s, below, fraction, CHUNKS: tl.constexpr):
    """Returns a number between the values number `below` and `below + 1` of |x0|, found bit by bit:
    they order as their bits do.

    Lanes past the end hold infinity. A NaN is below nothing, so that as many of the lowest values
    are missing.
    """
    found = tl.zeros((), tl.int32)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        trial = tl.minimum(found | bit, INFINITY)
        found = tl.where(
            _count_below(x0s, trial.to(tl.float32, bitcast=True), CHUNKS) <= below, trial, found
        )
        bit = bit >> 1
    low = found.to(tl.float32, bitcast=True)
    above = tl.where(tl.abs(x0s[0]) > low, tl.abs(x0s[0]), float("inf"))
    broken = x0s[0] != x0s[0]
    for i in tl.static_range(1, CHUNKS):
        above = tl.minimum(above, tl.where(tl.abs(x0s[i]) > low, tl.abs(x0s[i]), float("inf")))
        broken = broken | (x0s[i] != x0s[i])
    repeated = _count_below(x0s, (found + 1).to(tl.float32, bitcast=True), CHUNKS) > below + 1
    high = tl.where(repeated | (fraction == 0.0), low, tl.min(above, axis=0))
    return tl.where(
        tl.max(broken.to(tl.int32), axis=0) > 0, float("nan"), low + fraction * (high - low)
    )


@triton.jit
def _predict(
    state,
    gradient,
    cond,
    uncond,
    pred_cond,
    pred_uncond,
    base,
    at,
    scale,
    grad_scale,
    label_scale,
    finite,
    alpha,
    sigma,
    ELEMENTS: tl.constexpr,
    GUIDED: tl.constexpr,
    ANCHORED: tl.constexpr,
    HOLD: tl.constexpr,
    RELATIVE: tl.constexpr,
    PREDICTION: tl.constexpr,
):
    """Returns x0 and eps of one chunk, in fp32. HOLD: its predictions are `cond` and `uncond`."""
    inside = at < ELEMENTS
    state = state.to(tl.float32)
    if HOLD:
        pred = cond.to(tl.float32)
    else:
        pred = tl.load(pred_cond + base + at, mask=inside, other=0.0).to(tl.float32)
    if pred_uncond is not None:
        if HOLD:
            without = uncond.to(tl.float32)
        else:
            without = tl.load(pred_uncond + base + at, mask=inside, other=0.0).to(tl.float32)
        difference = pred - without
        pred = without + scale * difference
    if GUIDED:
        # A choice, not a product: zero times NaN is NaN.
        shift = tl.where(finite, grad_scale * gradient.to(tl.float32), 0.0)
        if ANCHORED:
            shift = tl.where(label_scale != 0.0, shift + label_scale * difference, shift)
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
    if GUIDED and not RELATIVE:
        x0 += sigma * _reciprocal(alpha) * shift
        eps -= shift
    return x0, eps


@triton.jit
def _finish(
    x0,
    eps,
    x0_prev,
    ids,
    out,
    x0_out,
    sample,
    base,
    first,
    bound,
    inverse,
    a,
    b,
    c,
    d,
    key,
    stream,
    ELEMENTS: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Limits x0 and writes the results of one chunk, which starts at element `first` of the
    sample.
    """
    at = first + tl.arange(0, BLOCK)
    inside = at < ELEMENTS
    if LIMIT > 0:
        x0 = tl.where(x0 > bound, bound, tl.where(x0 < -bound, -bound, x0))
    if LIMIT > 1:
        x0 *= inverse
    result = a * x0 + b * eps
    if x0_prev is not None:
        result += c * tl.load(x0_prev + base + at, mask=inside, other=0.0).to(tl.float32)
    if ids is not None:
        result += d * normals(tl.load(ids + sample), first, key, stream, BLOCK)
    if x0_out is not None:
        tl.store(x0_out + base + at, x0.to(x0_out.dtype.element_ty), mask=inside)
    if out is not None:
        tl.store(out + base + at, result.to(out.dtype.element_ty), mask=inside)


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
    anchor,
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
    ANCHOR_STRIDE: tl.constexpr,
    RELATIVE: tl.constexpr,
    PREDICTION: tl.constexpr,
    LIMIT: tl.constexpr,
    HOLD: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes CHUNKS * BLOCK elements of one sample a program. A tensor that is None drops its term
    at compile time.

    STEP_AT and SEED_AT: the argument is a pointer. CFG_STRIDE, OMEGA_STRIDE and ANCHOR_STRIDE: 0 or
    1 for a pointer, -1 for a number. HOLD: an anchored step keeps the predictions too, from their
    sums on.
    PARTS: the partial sums of a split sample, rounded up to a power of two.
    """
    sample = tl.program_id(0).to(tl.int64)
    base = sample * ELEMENTS
    start = tl.program_id(1) * (CHUNKS * BLOCK)
    lane = tl.arange(0, BLOCK)

    states = ()
    gradients = ()
    for i in tl.static_range(CHUNKS):
        at = start + i * BLOCK + lane
        states = states + (tl.load(x + base + at, mask=at < ELEMENTS, other=0.0),)
        if grad is not None:
            gradients = gradients + (tl.load(grad + base + at, mask=at < ELEMENTS, other=0.0),)
    if grad is None:
        gradients = states
    conds = states
    unconds = states
    if HOLD:
        conds = ()
        unconds = ()
        for i in tl.static_range(CHUNKS):
            at = start + i * BLOCK + lane
            conds = conds + (tl.load(pred_cond + base + at, mask=at < ELEMENTS, other=0.0),)
            unconds = unconds + (tl.load(pred_uncond + base + at, mask=at < ELEMENTS, other=0.0),)

    row = (tl.load(step) if STEP_AT else step).to(tl.int64)
    legal = (row >= 0) & (row < steps)
    column = table + tl.where(legal, row, 0) * 6
    nowhere = tl.where(legal, 0.0, float("nan"))
    alpha, sigma = tl.load(column) + nowhere, tl.load(column + 1) + nowhere
    scale = cfg_scale if CFG_STRIDE < 0 else tl.load(cfg_scale + sample * CFG_STRIDE)
    grad_scale = 0.0
    label_scale = 0.0
    finite = True
    if grad is not None:
        if partials is None:
            if anchor is not None:
                label_squares, along = _label_sums(
                    gradients,
                    conds,
                    unconds,
                    pred_cond,
                    pred_uncond,
                    base,
                    start,
                    ELEMENTS,
                    HOLD,
                    CHUNKS,
                    BLOCK,
                )
            state_squares = _sum_of_squares(states, CHUNKS)
            squares = _sum_of_squares(gradients, CHUNKS)
        else:
            SUMS: tl.constexpr = 2 if anchor is None else 4
            state_squares = _partial(partials, sample, 0, SUMS, PARTS)
            squares = _partial(partials, sample, 1, SUMS, PARTS)
            if anchor is not None:
                label_squares = _partial(partials, sample, 2, SUMS, PARTS)
                along = _partial(partials, sample, 3, SUMS, PARTS)
        finite = squares <= LARGEST
        strength = omega if OMEGA_STRIDE < 0 else tl.load(omega + sample * OMEGA_STRIDE)
        norm = tl.sqrt(state_squares) / (tl.sqrt(squares) + 1e-8) if RELATIVE else sigma
        grad_scale = strength * norm
        broken = (squares > LARGEST) | (squares != squares)
        if anchor is not None:
            kappa = anchor if ANCHOR_STRIDE < 0 else tl.load(anchor + sample * ANCHOR_STRIDE)
            finite = finite & ((kappa == 0.0) | (label_squares <= LARGEST))
            broken = finite == False  # noqa: E712 (a tensor)
            anchored = (
                finite
                & (kappa != 0.0)
                & (squares >= SMALLEST_SQUARES)
                & (label_squares >= SMALLEST_SQUARES)
            )
            length = tl.where(anchored, tl.sqrt(squares), 1.0)
            toward = (1.0 if PREDICTION == 2 else -1.0) / tl.where(
                anchored, tl.sqrt(label_squares), 1.0
            )
            if RELATIVE:
                kappa = tl.where(kappa > STRONGEST_ANCHOR, STRONGEST_ANCHOR, kappa)
                cosine = along * toward / length
                cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
                reach = tl.sqrt((1.0 - kappa) * (1.0 - kappa) + 2.0 * kappa * (1.0 + cosine))
                reach = tl.where(reach < SHORTEST_LENGTH, SHORTEST_LENGTH, reach)
                grad_scale = tl.where(anchored, grad_scale / reach, grad_scale)
            share = kappa * length * toward
            label_scale = tl.where(anchored, grad_scale * share, 0.0)
        if skipped is not None:
            tl.atomic_add(skipped, 1, mask=(start == 0) & broken, sem="relaxed")

    # With a quantile to find, x0 and eps of all chunks stay, and a thread has no registers for the
    # next chunk's loads. The compiler moves none across a loop. This one runs once: num_programs(1)
    # is 1 then, which only the launch knows. With an anchor it also keeps the second reading of the
    # predictions apart from the first: they would be joined, and what was read held.
    AGAIN: tl.constexpr = anchor is not None and partials is None and not HOLD
    x0s = ()
    epss = ()
    for i in tl.static_range(CHUNKS):
        at = start + i * BLOCK + lane
        if LIMIT == 2 or AGAIN:
            x0, eps = states[i].to(tl.float32), gradients[i].to(tl.float32)
            for _ in range(tl.num_programs(1)):
                x0, eps = _predict(
                    x0,
                    eps,
                    conds[i],
                    unconds[i],
                    pred_cond,
                    pred_uncond,
                    base,
                    at,
                    scale,
                    grad_scale,
                    label_scale,
                    finite,
                    alpha,
                    sigma,
                    ELEMENTS,
                    grad is not None,
                    anchor is not None,
                    HOLD,
                    RELATIVE,
                    PREDICTION,
                )
            if LIMIT == 2:
                x0 = tl.where(at < ELEMENTS, x0, float("inf"))
        else:
            x0, eps = _predict(
                states[i],
                gradients[i],
                conds[i],
                unconds[i],
                pred_cond,
                pred_uncond,
                base,
                at,
                scale,
                grad_scale,
                label_scale,
                finite,
                alpha,
                sigma,
                ELEMENTS,
                grad is not None,
                anchor is not None,
                HOLD,
                RELATIVE,
                PREDICTION,
            )
        x0s = x0s + (x0,)
        epss = epss + (eps,)

    if LIMIT == 2:
        bound = _quantile(x0s, below, fraction, CHUNKS)
        bound = tl.where(bound < 1.0, 1.0, tl.where(bound > maximum, maximum, bound))
    elif LIMIT == 3:
        bound = tl.load(bound + sample)
    inverse = 1.0 / bound if LIMIT > 1 else 1.0
    # Read here and not above: the search needs their registers. For a step outside the table x0 or
    # eps is NaN already.
    a = tl.load(column + 2)
    b = tl.load(column + 3)
    c = tl.load(column + 4)
    d = tl.load(column + 5)
    key = wide(tl.load(seed) if SEED_AT else seed)
    for i in tl.static_range(CHUNKS):
        for _ in range(tl.num_programs(1) if LIMIT == 2 else 1):
            if LIMIT == 2:
                tl.debug_barrier()  # or ptxas unrolls it
            _finish(
                x0s[i],
                epss[i],
                x0_prev,
                ids,
                out,
                x0_out,
                sample,
                base,
                start + i * BLOCK,
                bound,
                inverse,
                a,
                b,
                c,
                d,
                key,
                row + 1,
                ELEMENTS,
                LIMIT,
                BLOCK,
            )


def settings(
    elements: int,
    itemsize: int,
    quantile: bool = False,
    noise: bool = False,
    anchored: bool = False,
) -> tuple[int, int, int]:
    """Returns chunks, elements of a chunk and warps of a program, for tensors whose narrowest item
    has `itemsize` bytes.

    A thread takes 16 bytes of each tensor and chunk. The search for a quantile takes twice as many
    threads, where there are, and so does an anchor; with either and more than 8,192 elements (with
    a quantile alone, where there is noise) a thread has registers for four elements a chunk, 8
    bytes where an item has two. The audit shows that no setting spills.
    """
    if elements > WHOLE:
        return 1, SPLIT, 16
    if elements > WHOLE // 2 and (anchored or (quantile and noise)):
        itemsize = 4
    width = max(next_power(elements), 16)
    warps = min(max(width // (256 if quantile or anchored else 512), 1), 32)
    chunks = max(1, width // (warps * 32 * (16 // itemsize)))
    return chunks, width // chunks, warps


def launch(call: Call) -> None:
    """Launches the step of a call whose tensors lie on one device, in any memory layout."""
    options = call.options
    elements = math.prod(call.out.shape[1:])
    if call.out.shape[0] == 0:
        return
    inputs = tuple(map(dispatch.contiguous, call.inputs))
    targets = [dispatch.contiguous(tensor) for tensor in (call.out, call.x0_out)]
    partials = _norms(inputs, call.anchor is not None) if elements > WHOLE else None
    limit = Limit(0 if math.isinf(options.clip) else 1, options.clip)
    if options.threshold_ratio >= 0:
        position = options.threshold_ratio * (elements - 1)
        limit = Limit(
            2, 0.0, math.floor(position), position - math.floor(position), options.threshold_maximum
        )
        if elements > WHOLE:
            x0 = torch.empty(call.out.shape, dtype=torch.float32, device=call.out.device)
            bare = call._replace(sample_ids=None, skipped=None)
            _launch(bare, (*inputs[:4], None), None, x0, partials, Limit(0))
            bound = quantile(x0.reshape(-1, elements).abs(), options.threshold_ratio)
            limit = Limit(3, bound.clamp(1.0, options.threshold_maximum).contiguous())
    _launch(call, inputs, targets[0], targets[1], partials, limit)
    call.deliver(targets)


def _norms(inputs: Sequence[Tensor | None], anchored: bool) -> Tensor | None:
    """Returns the partial sums of split samples, (B, blocks, 2), with an anchor (B, blocks, 4)."""
    x, pred_cond, pred_uncond, grad, _ = inputs
    if grad is None:
        return None
    assert x is not None
    samples = x.shape[0]
    elements = math.prod(x.shape[1:])
    _, block, warps = settings(elements, x.element_size())
    blocks = -(-elements // block)
    partials = x.new_empty((samples, blocks, 4 if anchored else 2), dtype=torch.float32)
    predictions = (pred_cond, pred_uncond) if anchored else (None, None)
    norms_kernel[(samples, blocks)](
        x, grad, *predictions, partials, elements, block, num_warps=warps
    )
    return partials


def _launch(
    call: Call,
    inputs: tuple[Tensor | None, ...],
    out: Tensor | None,
    x0_out: Tensor | None,
    partials: Tensor | None,
    limit: Limit,
) -> None:
    """Writes contiguous `out` and `x0_out`; `inputs` are contiguous x, pred_cond, pred_uncond, grad
    and x0_prev.
    """
    samples = call.x.shape[0]
    elements = math.prod(call.x.shape[1:])
    x, pred_cond, pred_uncond, grad, x0_prev = inputs
    cfg_scale, omega, anchor = (
        v.contiguous() if isinstance(v, Tensor) else v
        for v in (call.cfg_scale, call.omega, call.anchor)
    )
    itemsize = min(tensor.element_size() for tensor in inputs if tensor is not None)
    chunks, block, warps = settings(
        elements, itemsize, limit.kind == 2, call.sample_ids is not None, anchor is not None
    )
    parts = -(-elements // (chunks * block))
    guided_step_kernel[(samples, parts)](
        x,
        pred_cond,
        pred_uncond,
        grad,
        x0_prev,
        out,
        x0_out,
        call.table.contiguous(),
        call.table.shape[0],
        call.step,
        cfg_scale,
        omega,
        anchor,
        dispatch.contiguous(call.sample_ids),
        call.seed,
        call.skipped,
        partials,
        limit.bound,
        limit.below,
        limit.fraction,
        limit.maximum,
        elements,
        isinstance(call.step, Tensor),
        isinstance(call.seed, Tensor),
        _stride(cfg_scale),
        _stride(omega),
        _stride(anchor),
        call.options.mode == "relative",
        PREDICTIONS[call.options.prediction],
        limit.kind,
        anchor is not None and elements <= HELD,
        next_power(parts),
        chunks,
        block,
        num_warps=warps,
    )


def _stride(value: float | Tensor | None) -> int:
    return value.dim() if isinstance(value, Tensor) else -1
