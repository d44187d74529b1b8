"""A linear layer whose weights never change, on a CPU in fp32: one call of oneDNN with the bias and
the GELU inside.

    y = x W^T + b,   or   gelu(x W^T + b) in its tanh form

PyTorch's own layer copies the bias into the result and adds a product of MKL to it. At a denoiser's
sizes, about 2,000 rows and 200 to 800 columns, oneDNN is 1.1 to 1.3 times as fast, and 1.8 times
with the GELU of a feed-forward layer. A weight that is kept transposed, (in, out) in memory, is in
the order in which oneDNN reads it without a copy.

Bytes: 4 (rows in + in out + out + rows out). The kernel is oneDNN's, called through PyTorch; where
PyTorch was built without it, ``reference`` runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dpfast.ops import check


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Returns the formula in plain PyTorch."""
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    activation, form = ("gelu", "tanh") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], form)


@torch.library.custom_op("dpfast::frozen_linear", mutates_args=())
def _operation(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    run = _onednn if torch.backends.mkldnn.is_available() else reference
    return run(x, weight, bias, gelu)


@_operation.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


@register_flop_formula(torch.ops.dpfast.frozen_linear)
def _flops(x: Any, weight: Any, bias: Any, gelu: bool, **_: Any) -> int:
    """Returns the FLOPs of shapes: counters see the operation, and not what it calls."""
    return 2 * math.prod(x) * weight[0]


class _Differentiable(torch.autograd.Function):
    """The layer without its activation, differentiable in x; the weights are frozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _operation(x, weight, bias, False)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _operation(grads[0], weight.t(), None, False), None, None


def frozen_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """Returns a linear layer with weights that never change, and the tanh form of GELU behind it.

    Args:
        x: (..., in) fp32 on a CPU.
        weight: (out, in) fp32 of any strides; fastest as the transpose of a contiguous tensor.
        bias: (out,) fp32, or None.
        gelu: True applies the GELU.

    Returns:
        (..., out) fp32; differentiable once, in x only. Inside a compiled ``torch.func.vjp`` x must
        not be the input of the vjp itself, which PyTorch 2.13 takes for a constant there (it
        raises).

    Raises:
        InputError: For tensors on different devices.
        TypeError: For a wrong type or dtype.
    """
    check.tensor("x", x, (torch.float32,), weight.device)
    if not x.requires_grad:
        return _operation(x, weight, bias, gelu)
    y = _Differentiable.apply(x, weight, bias)
    # The derivative of the GELU needs its input, so it is not fused here.
    return F.gelu(y, approximate="tanh") if gelu else y
