"""Rows in 8 bits, for products on tensor cores of twice the rate: float8 (e4m3) with one factor a
row.

    y = q s,   s = max |y| / 448,   q = y / s rounded to float8      (448: the largest float8)

A row is a token of an activation or an output channel of a weight, so that no sample depends on
another. q keeps three bits of mantissa: the rounding error of an element is at most 1/16 of it, and
at most s / 1024 where it is small. In front a GELU may be taken along, in its tanh form.

Bytes for n elements of b bytes in r rows: n b + n + 4 r.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.traffic import register_traffic
from dpfast.ops.triton_stub import next_power, tl, triton

FLOAT8 = torch.float8_e4m3fn
HOPPER = (9, 0)  # the first compute capability whose products in float8 take a factor a row
LARGEST = 448.0
SMALLEST = 1e-12  # of max |y|: a row of zeros has a factor, too


class Quantised(NamedTuple):
    """Rows in float8 with one factor each.

    Attributes:
        values: (..., D) float8_e4m3fn.
        scales: (..., 1) fp32, by which the values are multiplied.
    """

    values: Tensor
    scales: Tensor


def reference(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Returns the formula in plain PyTorch, in fp32 throughout."""
    wide = x.float()
    if gelu:
        wide = F.gelu(wide, approximate="tanh")
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    return (wide * (LARGEST / largest)).to(FLOAT8), largest / LARGEST


@triton.jit
def store_row(y, values, scales, row, column, real, D: tl.constexpr):
    """Writes a row y in fp32, zero where it is not real, as float8 with its factor."""
    largest = tl.maximum(tl.max(tl.abs(y), axis=0), 1e-12)
    tl.store(scales + row, largest / 448.0)
    small = (y * (448.0 / largest)).to(values.dtype.element_ty)
    tl.store(values + row * D + column, small, mask=real)


@triton.jit
def quantise_kernel(x, values, scales, GELU: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Quantises one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < D
    y = tl.load(x + row * D + column, mask=real, other=0.0).to(tl.float32)
    if GELU:
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    store_row(y, values, scales, row, column, real, D)


def settings(channels: int) -> tuple[int, int]:
    """Returns lanes and warps of a row: 16 channels a thread, which are 16 bytes of the result."""
    block = next_power(channels)
    return block, min(max(1, block // 512), 16)


def _forward(x: Tensor, gelu: bool, values_dtype: torch.dtype = FLOAT8) -> tuple[Tensor, Tensor]:
    """Returns values and scales of rows. values_dtype: float8, or for tests fp32: what is rounded
    to it.
    """
    x = x.contiguous()
    values = torch.empty_like(x, dtype=values_dtype)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        channels = x.shape[-1]
        block, warps = settings(channels)
        quantise_kernel[(scales.numel(),)](
            x, values, scales, gelu, channels, block, num_warps=warps
        )
    return values, scales


# Called in a graph, where something looks at it; `_forward` otherwise.
@torch.library.custom_op("dpfast::quantise", mutates_args=())
def _operation(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return _forward(x, gelu)


@_operation.register_fake
def _(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FLOAT8), scales


def bytes_moved(elements: int, rows: int, itemsize: int) -> int:
    """Returns the bytes that a launch reads and writes."""
    return elements * (itemsize + 1) + 4 * rows


@register_traffic(torch.ops.dpfast.quantise)
def _traffic(x: Tensor, gelu: bool, *, out: tuple[Tensor, Tensor]) -> tuple[int]:
    return (bytes_moved(x.numel(), out[1].numel(), x.itemsize),)


def quantise(x: Tensor, *, gelu: bool = False) -> Quantised:
    """Returns rows in float8 (e4m3) with one factor each.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022).

    Args:
        x: (..., D) fp32, fp16 or bf16; other than contiguous it is copied.
        gelu: True applies the tanh form of GELU first.

    Returns:
        Values (..., D) float8_e4m3fn and scales (..., 1) fp32, on x's device. It has no gradient: x
        counts as a constant. A row that is not finite gives values or a scale that are not, so that
        its products are not either.

    Raises:
        InputError: For x without a row.
        TypeError: For a wrong type or dtype.
    """
    x = check.tensor("x", x, check.FLOATS).detach()
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (..., D)")
    if not dispatch.has_kernels("quantise", x):
        return Quantised(*reference(x, gelu))
    return Quantised(*(_operation if dispatch.in_graph(x) else _forward)(x, gelu))
