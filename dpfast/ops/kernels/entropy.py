"""The Triton kernels of `entropy_and_grad`: whole rows in registers, or a running sum over long
ones.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

from torch import Tensor

from dpfast.ops.triton_stub import next_power, tl, triton

LOWEST = tl.constexpr(-3.4028234663852886e38)
FLOOR = tl.constexpr(-87.0)  # exp(-87) is the last normal float; below it p counts as zero
ONE_BLOCK = 16384  # columns that a program still holds in registers
CHUNK = 4096


@triton.jit
def _exponential(z, top, inverse_temperature):
    """d = (z - top) / T, never below FLOOR, and e^d. Comparisons, not maxima: they let a NaN
    through.
    """
    d = (z - top) * inverse_temperature
    d = tl.where(d < FLOOR, FLOOR, d)
    return d, tl.where(d <= FLOOR, 0.0, tl.exp(d))


@triton.jit
def rows_kernel(
    logits,
    entropy,
    dlogits,
    rows,
    stride_units,
    inverse_temperature,
    CLASSES: tl.constexpr,
    UNIT: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS whole rows a program. The row stride comes in units of UNIT, which tells the compiler
    its alignment.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None] < rows) & (column < CLASSES)
    z = tl.load(
        logits + row[:, None] * stride_units * UNIT + column, mask=inside, other=float("-inf")
    ).to(tl.float32)
    # LOWEST keeps a row of -inf from inf - inf; its sum is 0, and 0 / 0 makes it NaN as it should
    # be.
    top = tl.maximum(tl.max(z, axis=1), LOWEST)[:, None]
    d, e = _exponential(z, top, inverse_temperature)
    total = tl.sum(e, axis=1)
    mean = tl.sum(e * d, axis=1) / total
    tl.store(entropy + row, tl.log(total) - mean, mask=row < rows)
    if GRADIENT:
        gradient = e * (d - mean[:, None]) * (-inverse_temperature / total)[:, None]
        target = dlogits + row[:, None] * CLASSES + column
        tl.store(target, gradient.to(dlogits.dtype.element_ty), mask=inside)


@triton.jit
def online_kernel(
    logits,
    entropy,
    dlogits,
    stride_units,
    inverse_temperature,
    CLASSES: tl.constexpr,
    UNIT: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program, too long for registers: running sums, and a second read for the
    gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * stride_units * UNIT
    top = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for first in range(0, CLASSES, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(source + column, mask=column < CLASSES, other=float("-inf")).to(tl.float32)
        above = tl.maximum(tl.max(z, axis=0), top)
        shift, decay = _exponential(top, above, inverse_temperature)
        d, e = _exponential(z, above, inverse_temperature)
        weighted = decay * (weighted + total * shift) + tl.sum(e * d, axis=0)
        total = decay * total + tl.sum(e, axis=0)
        top = above
    mean = weighted / total
    tl.store(entropy + row, tl.log(total) - mean)
    if GRADIENT:
        scale = -inverse_temperature / total
        for first in range(0, CLASSES, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < CLASSES
            z = tl.load(source + column, mask=inside, other=float("-inf")).to(tl.float32)
            d, e = _exponential(z, top, inverse_temperature)
            gradient = e * (d - mean) * scale
            tl.store(
                dlogits + row * CLASSES + column, gradient.to(dlogits.dtype.element_ty), mask=inside
            )


def settings(classes: int) -> tuple[int, int, int]:
    """Rows and columns of a program and its warps; the audit shows that none of them spills."""
    block = next_power(classes)
    if classes > ONE_BLOCK:
        return 1, CHUNK, 8
    return max(1, 1024 // block) if classes < 512 else 1, block, min(max(4, block // 512), 32)


def launch(logits: Tensor, temperature: float, entropy: Tensor, dlogits: Tensor | None) -> None:
    """Writes the entropy, and the gradient where `dlogits` is given; the columns of `logits` are
    contiguous.
    """
    rows, classes = logits.shape
    if rows == 0:
        return
    tile, block, warps = settings(classes)
    unit = math.gcd(logits.stride(0), 16)
    stride, scale = logits.stride(0) // unit, 1.0 / temperature
    target, gradient = (entropy, False) if dlogits is None else (dlogits, True)
    if classes <= ONE_BLOCK:
        rows_kernel[(-(-rows // tile),)](
            logits,
            entropy,
            target,
            rows,
            stride,
            scale,
            classes,
            unit,
            gradient,
            tile,
            block,
            num_warps=warps,
        )
    else:
        online_kernel[(rows,)](
            logits, entropy, target, stride, scale, classes, unit, gradient, block, num_warps=warps
        )
