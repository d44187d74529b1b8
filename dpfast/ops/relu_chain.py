"""Convolutions in a chain, each with its bias, a residual and a ReLU: what a tiny autoencoder is.

    y_i = relu(w_i * y_(i - 1) + b_i + y_r(i))      y_0 = x; r(i) < i, or no residual
    dz_i = (dy_i + those dz_j with r(j) = i) (y_i > 0),   dy_(i - 1) = w_i^T * dz_i

Each w_i is 3x3 and keeps height and width. Forward, all of a step is inside its product (cuDNN's
fused convolution): what moves is x, w, y and the residual. PyTorch's bias, sum and ReLU are 7 n b
beside it for n elements of b bytes. Backward, the mask takes the residual's gradient along in one
pass of 3 n b, or 4 n b with a residual (PyTorch: 3 and 6); the weights are frozen.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.layout import nhwc, nhwc_like
from dpfast.ops.traffic import register_traffic
from dpfast.ops.triton_stub import tl, triton

WARPS = 4
BLOCK = 2048
ONE = (1, 1)  # stride, padding and dilation


def reference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """Returns one step of the formula in plain PyTorch, rounded where its operations round."""
    z = F.conv2d(x, weight, bias, padding=1)
    return F.relu(z if residual is None else z + residual)


@triton.jit
def relu_backward_kernel(dy, more, y, dz, elements, BLOCK: tl.constexpr):
    """Writes dz of BLOCK elements; more: the gradient of y as a residual, or None."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if more is not None:
        slope += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    # a NaN passes, as in PyTorch
    slope = tl.where(tl.load(y + at, mask=inside, other=0.0) <= 0, 0.0, slope)
    tl.store(dz + at, slope.to(dz.dtype.element_ty), mask=inside)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    x, weight = nhwc(x), nhwc(weight)
    if not x.is_cuda or _repeats() or not _has_fused(x.device, x.dtype):
        return nhwc(reference(x, weight, bias, residual))
    return _cudnn(x, weight, bias, residual)


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, ONE, ONE, ONE, 1)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, ONE, ONE, ONE, 1)


def _repeats() -> bool:
    """Returns True if bits have to repeat, which PyTorch does not ask of these kernels of cuDNN."""
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


@functools.cache
def _has_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns True if cuDNN has the fused convolution, asked once with an image of 8x8 pixels."""
    x = torch.zeros(1, 8, 8, 64, device=device, dtype=dtype).movedim(-1, 1)
    weight = torch.zeros(64, 3, 3, 64, device=device, dtype=dtype).movedim(-1, 1)
    try:
        for residual in (None, x.clone()):
            _cudnn(x, weight, x.new_zeros(64), residual)
    except RuntimeError as error:
        warnings.warn(
            f"cuDNN has no fused convolution for {dtype} on {device} ({error}); bias, residual "
            "and ReLU run apart",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _backward(dy: Tensor, y: Tensor, more: Tensor | None) -> Tensor:
    dy, y, more = nhwc(dy), nhwc(y), None if more is None else nhwc(more)
    dz = nhwc_like(y, y.shape[1])
    if y.numel():
        programs = -(-y.numel() // BLOCK)
        relu_backward_kernel[(programs,)](dy, more, y, dz, y.numel(), BLOCK, num_warps=WARPS)
    return dz


# Called in a graph, where something looks at it; `_forward` otherwise.
_operation = torch.library.custom_op("dpfast::conv_relu", _forward, mutates_args=())
_derivative = torch.library.custom_op("dpfast::relu_backward", _backward, mutates_args=())


@_operation.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return nhwc_like(x, len(weight))


@_derivative.register_fake
def _(dy: Tensor, y: Tensor, more: Tensor | None) -> Tensor:
    return nhwc_like(y, y.shape[1])


@register_flop_formula(torch.ops.dpfast.conv_relu)
def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of shapes: counters see the operation, and not what it calls."""
    return 2 * x[0] * math.prod(x[2:]) * math.prod(weight)


@register_traffic(torch.ops.dpfast.conv_relu, "product")
def _traffic(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *, out: Tensor
) -> tuple[int]:
    elements = x.numel() + weight.numel() + out.numel() * (1 if residual is None else 2)
    return (elements * x.itemsize,)


@register_traffic(torch.ops.dpfast.relu_backward)
def _backward_traffic(dy: Tensor, y: Tensor, more: Tensor | None, *, out: Tensor) -> tuple[int]:
    return ((3 if more is None else 4) * y.numel() * y.itemsize,)


Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _run(
    step: Step, x: Tensor, residuals: Sequence[int], parameters: Sequence[Tensor], keep: bool
) -> list[Any]:
    """Returns x, y_1, ...; where they are not kept, None for those that nothing asks for any
    more.
    """
    results: list[Any] = [x]
    pairs = zip(parameters[::2], parameters[1::2], residuals, strict=True)
    for index, (weight, bias, source) in enumerate(pairs):
        residual = None if source < 0 else results[source]
        results.append(step(results[index], weight, bias, residual))
        for done in () if keep else {index, max(source, 0)}.difference(residuals[index + 1 :]):
            results[done] = None
    return results


class _Differentiable(torch.autograd.Function):
    """The chain with its derivative in x; weights and biases are frozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, residuals: tuple[int, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(_run(_operation, x, residuals, parameters, True)[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.residuals, *parameters = inputs
        ctx.mark_non_differentiable(*output[:-1])
        ctx.set_materialize_grads(False)  # no zeros for what has no derivative
        ctx.save_for_backward(x, *parameters[::2], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.residuals)
        x, *saved = ctx.saved_tensors
        weights, results = saved[:count], [x, *saved[count:]]
        slope = grads[-1]
        waiting: dict[int, Tensor] = {}  # the gradients of residuals, by their sources
        for index, source in reversed(list(enumerate(ctx.residuals))):
            dz = _derivative(slope, results[index + 1], waiting.pop(index + 1, None))
            if source >= 0:
                waiting[source] = waiting[source] + dz if source in waiting else dz
            slope = torch.ops.aten.convolution_backward(
                dz,
                results[index],
                weights[index],
                None,
                *(ONE, ONE, ONE),
                False,
                (0, 0),
                1,
                (True, False, False),
            )[0]
        dx = slope + waiting[0] if 0 in waiting else slope
        return dx, *[None] * (1 + 2 * count)


def relu_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residuals: Sequence[int],
) -> Tensor:
    """Runs 3x3 convolutions one after the other, each with its bias, a residual and a ReLU.

    Args:
        x: (B, C, H, W) fp32, fp16 or bf16, best in channels_last memory.
        weights: One (C', C, 3, 3) a convolution, in x's dtype, best in channels_last memory. Each
            pads by one pixel.
        biases: One (C',) a convolution, in x's dtype.
        residuals: Number of the result that each convolution adds: 0 is x, 1 that of the first
            convolution, and so on; -1 for none.

    Returns:
        (B, C', H, W) in x's dtype, the result of the last convolution. Differentiable once, in x
        only: weights and biases count as constants (frozen).

    Raises:
        InputError: For a wrong shape or device, and a residual that is not made yet.
        TypeError: For a wrong type or dtype.
    """
    dtypes = (*check.FLOATS, torch.float64)
    check.tensor("x", x, dtypes)
    if x.dim() != 4:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (B, C, H, W)")
    if not len(weights) == len(biases) == len(residuals) > 0:
        raise InputError(
            f"{len(weights)} weights, {len(biases)} biases and {len(residuals)} residuals: "
            "expected as many of each, and at least one"
        )
    widths = [x.shape[1]]
    for index, (weight, bias, source) in enumerate(zip(weights, biases, residuals, strict=True)):
        name = f"weights[{index}]"
        check.tensor(name, weight, (x.dtype,), x.device)
        check.shaped(name, weight, (*weight.shape[:1], widths[-1], 3, 3))
        widths.append(len(weight))
        name = f"biases[{index}]"
        check.shaped(name, check.tensor(name, bias, (x.dtype,), x.device), (widths[-1],))
        if not -1 <= source <= index or (source >= 0 and widths[source] != widths[-1]):
            raise InputError(
                f"residuals[{index}] = {source}: expected -1, or a result from 0 to {index} of "
                f"{widths[-1]} channels"
            )
    parameters = [p.detach() for pair in zip(weights, biases, strict=True) for p in pair]
    order = tuple(residuals)
    if not dispatch.has_kernels("relu_chain", x):
        return _run(reference, x, order, parameters, False)[-1]
    if torch.is_grad_enabled() and x.requires_grad:
        return _Differentiable.apply(x, order, *parameters)[-1]
    step = _operation if dispatch.in_graph(x) else _forward
    return _run(step, x, order, parameters, False)[-1]
