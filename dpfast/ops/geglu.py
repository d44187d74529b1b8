"""The gated activation of a feed-forward layer: half of the channels times the GELU of the others.

    x = [a, g],   y = a gelu(g),   gelu(g) = g (1 + erf(g / sqrt 2)) / 2
    da = dy gelu(g),   dg = dy a ((1 + erf(g / sqrt 2)) / 2 + g exp(-g^2 / 2) / sqrt(2 pi))

Bytes for rows of C results of b bytes: 3 C b forward, 5 C b backward, whose two halves go into one
tensor. In PyTorch the GELU and the product are two passes (5 C b), and the backward pass is three
and joins the halves by a copy (12 C b).
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.traffic import register_traffic
from dpfast.ops.triton_stub import next_power, tl, triton

WARPS = 4
FORWARD, BACKWARD = 2048, 1024  # elements of y in a program


def reference(x: Tensor) -> Tensor:
    """Returns the formula in plain PyTorch, rounded where its operations round."""
    a, gate = x.chunk(2, dim=-1)
    return a * F.gelu(gate)


@triton.jit
def _place(C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the rows and the columns of y that a program works on."""
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row[:, None], ((program % BLOCKS) * BLOCK + tl.arange(0, BLOCK))[None, :]


@triton.jit
def geglu_kernel(x, out, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes y of ROWS x BLOCK elements."""
    row, column = _place(C, ROWS, BLOCK)
    inside = (row < rows) & (column < C)
    source = x + row * 2 * C + column
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + C, mask=inside, other=0.0).to(tl.float32)
    y = a * gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    tl.store(out + row * C + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward_kernel(
    x, dy, dx, rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes da and dg of ROWS x BLOCK elements of y."""
    row, column = _place(C, ROWS, BLOCK)
    inside = (row < rows) & (column < C)
    source = x + row * 2 * C + column
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + C, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + row * C + column, mask=inside, other=0.0).to(tl.float32)
    half = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    target = dx + row * 2 * C + column
    tl.store(target, (slope * gate * half).to(dx.dtype.element_ty), mask=inside)
    dg = slope * a * (half + gate * density)
    tl.store(target + C, dg.to(dx.dtype.element_ty), mask=inside)


def settings(channels: int, backward: bool = False) -> tuple[int, int]:
    """Returns rows and columns of a program: columns that divide C where 64 or more do, so that no
    lane idles.
    """
    elements = BACKWARD if backward else FORWARD
    divisor = channels & -channels
    block = min(divisor if divisor >= 64 else next_power(channels), elements)
    return elements // block, block


def bytes_moved(elements: int, itemsize: int, *, backward: bool = False) -> int:
    """Returns the bytes that the launch for so many elements of y reads and writes."""
    return (5 if backward else 3) * elements * itemsize


def _forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    channels = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    if out.numel():
        rows, block = settings(channels)
        count = out.numel() // channels
        programs = -(-count // rows) * -(-channels // block)
        geglu_kernel[(programs,)](x, out, count, channels, rows, block, num_warps=WARPS)
    return out


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    channels = dy.shape[-1]
    dx = torch.empty_like(x)
    if dy.numel():
        rows, block = settings(channels, backward=True)
        count = dy.numel() // channels
        programs = -(-count // rows) * -(-channels // block)
        geglu_backward_kernel[(programs,)](x, dy, dx, count, channels, rows, block, num_warps=WARPS)
    return dx


# Called in a graph, where something looks at it; `_forward` otherwise.
_operation = torch.library.custom_op("dpfast::geglu", _forward, mutates_args=())
_derivative = torch.library.custom_op("dpfast::geglu_backward", _backward, mutates_args=())


@_operation.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@_derivative.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_traffic(torch.ops.dpfast.geglu)
def _traffic(x: Tensor, *, out: Tensor) -> tuple[int]:
    return (bytes_moved(out.numel(), out.itemsize),)


@register_traffic(torch.ops.dpfast.geglu_backward)
def _backward_traffic(dy: Tensor, x: Tensor, *, out: Tensor) -> tuple[int]:
    return (bytes_moved(dy.numel(), dy.itemsize, backward=True),)


class _Differentiable(torch.autograd.Function):
    """The registered operation with its derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _operation(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _derivative(grads[0], *ctx.saved_tensors)


def geglu(x: Tensor) -> Tensor:
    """Returns one half of the channels times the GELU of the other.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020); the GELU is the exact one.

    Args:
        x: (..., 2 C) fp32, fp16 or bf16, the gates last; other than contiguous it is copied.

    Returns:
        (..., C) in x's dtype. Differentiable once.

    Raises:
        InputError: For an odd number of channels.
        TypeError: For a wrong type or dtype.

    Examples:
        >>> import torch
        >>> from dpfast.ops import geglu
        >>> geglu(torch.tensor([2.0, 3.0, 0.0, 1.0]))  # 2 gelu(0), 3 gelu(1)
        tensor([0.0000, 2.5240])
    """
    check.tensor("x", x, (*check.FLOATS, torch.float64))
    if x.dim() == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (..., 2 C)")
    if not dispatch.has_kernels("geglu", x):
        return reference(x)
    return (_Differentiable.apply if dispatch.in_graph(x) else _forward)(x)
