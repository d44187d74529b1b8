"""The end of a residual block: the bias that its convolution left out, and the residual.

    y = x + b + r

Bytes for n elements of b bytes: 3 n b; a convolution's own bias and the sum are two passes, 5 n b.
The gradients of x and r are that of y itself: a backward pass launches nothing.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.layout import nhwc, nhwc_like
from dpfast.ops.traffic import register_traffic
from dpfast.ops.triton_stub import tl, triton

WARPS = 4
BLOCK = 2048


def reference(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Returns the formula in plain PyTorch, rounded where its operations round."""
    return x + bias.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2)) + residual


@triton.jit
def bias_residual_kernel(x, bias, residual, out, elements, C: tl.constexpr, BLOCK: tl.constexpr):
    """Writes y of BLOCK elements; channels lie next to each other."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias + at % C, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def _forward(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    x, residual, bias = nhwc(x), nhwc(residual), bias.contiguous()
    out = nhwc_like(x, x.shape[1])
    if x.numel():
        programs = -(-x.numel() // BLOCK)
        bias_residual_kernel[(programs,)](
            x, bias, residual, out, x.numel(), x.shape[1], BLOCK, num_warps=WARPS
        )
    return out


# Called in a graph, where something looks at it; `_forward` otherwise.
_operation = torch.library.custom_op("dpfast::bias_residual", _forward, mutates_args=())


@_operation.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return nhwc_like(x, x.shape[1])


@register_traffic(torch.ops.dpfast.bias_residual)
def _traffic(x: Tensor, bias: Tensor, residual: Tensor, *, out: Tensor) -> tuple[int]:
    return (3 * x.numel() * x.itemsize,)


class _Differentiable(torch.autograd.Function):
    """The registered operation with its derivative in x and the residual; the bias is frozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return _operation(x, bias, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        return grads[0], None, grads[0]


def bias_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Returns x + bias + residual.

    Args:
        x: (B, C, H, W), or any (B, C, ...), fp32, fp16 or bf16, best in channels_last memory.
        bias: (C,) of any floating dtype.
        residual: Like x.

    Returns:
        (B, C, H, W) in x's dtype, in channels_last memory where the kernel made it. Differentiable
        in x and the residual; the bias counts as a constant (frozen).

    Raises:
        InputError: For a wrong shape or device.
        TypeError: For a wrong type or dtype.
    """
    dtypes = (*check.FLOATS, torch.float64)
    check.tensor("x", x, dtypes)
    if x.dim() < 3:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (B, C, H, W)")
    check.shaped("bias", check.tensor("bias", bias, dtypes, x.device), (x.shape[1],))
    check.shaped("residual", check.tensor("residual", residual, (x.dtype,), x.device), x.shape)
    bias = bias.detach()
    if not dispatch.has_kernels("bias_residual", x):
        return reference(x, bias, residual)
    run = _Differentiable.apply if dispatch.in_graph(x, residual) else _forward
    return run(x, bias, residual)
