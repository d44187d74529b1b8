"""GroupNorm of images in NHWC, with what a residual block has before and behind it: a shift of each
(sample, channel), which carries a folded bias and a row of the time embedding, and a SiLU.

    u = x + s,   z = w (u - mean) / sqrt(var + eps) + b,   y = z  or  z sigmoid(z)

mean and var are those of a group of channels of one sample. In three launches:

    1. of every block of rows and every channel the mean, and the sum of squares around it
    2. of every (sample, channel)    a = w / sqrt(var + eps),   c = (s - mean) a + b
    3. z = a x + c, y

and the gradient of the input in three more, with z from a and c again; dz = dy dy/dz, and means
over a group:

    1. of every block of rows and every channel the sums of dz and of dz (z - b)
    2. of every (sample, channel)    k = -mean(dz (z - b)) / (var + eps),
                                     l = -mean(w dz) / sqrt(var + eps) - k (mean - s)
    3. dx = a dz + k x + l + v       v: what reaches x from elsewhere, if anything does

Bits repeat, and no sample's bits depend on another's. Two tensors in the place of x are normalised
as their concatenation, which never exists.

Bytes for n elements of b bytes: 3 n b forward, 5 n b backward, 6 n b with v, and 16 for each block
of rows of a channel (``bytes_moved``). PyTorch 2.13 has no kernel for NHWC on CUDA: it transposes
to NCHW, the next convolution transposes back, shift and SiLU are kernels of their own, 11 n b and
12 n b. A CPU runs PyTorch's own operations, of which a kernel could save too little
(docs/records/numerics.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.group_norm.triton import backward as _backward
from dpfast.ops.group_norm.triton import bytes_moved, table
from dpfast.ops.group_norm.triton import forward as _forward
from dpfast.ops.layout import nhwc, nhwc_like
from dpfast.ops.traffic import register_traffic

Sources = Tensor | tuple[Tensor, Tensor]  # a tensor, or the two whose concatenation is meant


def reference(
    x: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """Returns the formula in plain PyTorch, rounded where its operations round."""
    x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
    if shift is not None:
        x = x + shift.to(x.dtype).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))
    y = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


# Called in a graph, where something looks at it; `_forward` otherwise.
_operation = torch.library.custom_op("dpfast::group_norm", _forward, mutates_args=())
_derivative = torch.library.custom_op("dpfast::group_norm_backward", _backward, mutates_args=())


@_operation.register_fake
def _(
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = first.shape[1] + (0 if second is None else second.shape[1])
    return nhwc_like(first, channels), table(first, 2, channels), table(first, 2, groups)


@_derivative.register_fake
def _(
    dy: Tensor, first: Tensor, second: Tensor | None, *_: Tensor | bool | None, **__: Tensor | None
) -> tuple[Tensor, Tensor]:
    return nhwc_like(first, first.shape[1]), nhwc_like(
        first, 0 if second is None else second.shape[1]
    )


@register_traffic(torch.ops.dpfast.group_norm)
def _traffic(first: Tensor, second: Tensor | None, *_: Any, **__: Any) -> tuple[int, ...]:
    return _bytes(first, second)


@register_traffic(torch.ops.dpfast.group_norm_backward)
def _backward_traffic(
    dy: Tensor, first: Tensor, second: Tensor | None, *rest: Any, out: Any
) -> tuple[int, ...]:
    vfirst = rest[6] if len(rest) > 6 else None
    return _bytes(first, second, backward=True, more=vfirst is not None)


def _bytes(first: Tensor, second: Tensor | None, **which: bool) -> tuple[int, ...]:
    channels = (first.shape[1],) if second is None else (first.shape[1], second.shape[1])
    pixels = math.prod(first.shape[2:])
    return bytes_moved(len(first), channels, pixels, first.itemsize, **which)


class _Differentiable(torch.autograd.Function):
    """The registered operation with its derivative in the sources; all else is frozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        first: Tensor,
        second: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        shift: Tensor | None,
        silu: bool,
    ) -> tuple[Tensor, ...]:
        made = _operation(first, second, weight, bias, groups, eps, shift, silu)
        # handed on, so that the gradients of their other uses are summed in the kernel
        sources = (first,) if second is None else (first, second)
        return *made, *(source.view_as(source) for source in sources)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        first, second, weight, bias, _, _, shift, ctx.silu = inputs
        ctx.mark_non_differentiable(*output[1:3])
        ctx.set_materialize_grads(False)  # no zeros for what has no derivative
        ctx.save_for_backward(first, second, weight, bias, shift, *output[1:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors[:2]
        dy, more = grads[0], list(grads[3:])
        if dy is None:
            return *more, *[None] * (8 - len(more))
        if len(more) == 2 and (more[0] is None) != (more[1] is None):
            pairs = zip(more, (first, second), strict=True)
            more = [torch.zeros_like(source) if v is None else v for v, source in pairs]
        more = [None if each is None else nhwc(each) for each in more]
        dfirst, dsecond = _derivative(nhwc(dy), *ctx.saved_tensors, ctx.silu, *more)
        return dfirst, None if second is None else dsecond, None, None, None, None, None, None


def _check_arguments(
    sources: tuple[Tensor, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
) -> None:
    dtypes = (*check.FLOATS, torch.float64)
    names = ("x",) if len(sources) == 1 else ("x[0]", "x[1]")
    first = check.tensor(names[0], sources[0], dtypes)
    if first.dim() < 3:
        raise InputError(f"{names[0]} has shape {tuple(first.shape)}, expected (B, C, H, W)")
    for name, source in zip(names[1:], sources[1:], strict=True):
        check.tensor(name, source, (first.dtype,), first.device)
        channels = source.shape[1] if source.dim() > 1 else 0
        check.shaped(name, source, (first.shape[0], channels, *first.shape[2:]))
    channels = sum(source.shape[1] for source in sources)
    check.whole("groups", groups, "at least one group")
    if channels == 0 or channels % groups:
        raise InputError(f"groups = {groups}: expected a divisor of the {channels} channels of x")
    check.number("eps", eps)
    if eps < 0:
        raise InputError(f"eps = {eps}: expected a number that is not negative")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check.shaped(name, check.tensor(name, value, dtypes, first.device), (channels,))
    if shift is not None:
        check.tensor("shift", shift, dtypes, first.device)
        if shift.shape not in (torch.Size((channels,)), torch.Size((len(first), channels))):
            raise InputError(
                f"shift has shape {tuple(shift.shape)}, expected ({channels},) or "
                f"({len(first)}, {channels})"
            )


def group_norm(
    x: Sources,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Returns the GroupNorm of x, or of two tensors as if concatenated, with a SiLU behind it.

    Source: Wu and He, "Group Normalization" (2018).

    Args:
        x: (B, C, H, W), or any (B, C, ...), fp32, fp16 or bf16, best in channels_last memory: the
            kernels work on a channels_last copy of any other layout. Or two such tensors, of C1 and
            C2 channels and otherwise alike; C = C1 + C2.
        weight: (C,) factors of the channels, or None for 1.
        bias: (C,) or None for 0.
        groups: Number of groups of neighbouring channels.
        eps: Number that is added to the variance.
        shift: (C,) or (B, C), added to x first; or None. In the kernels it costs nothing.
        silu: True returns y = z sigmoid(z) of the normalised z.

    Returns:
        (B, C, H, W) in x's dtype, in channels_last memory where kernels made it. Differentiable
        once, in x only: weight, bias and shift count as constants (frozen), even where they ask for
        a gradient. A sample's bits depend on no other sample.

    Raises:
        InputError: For a wrong shape or device, a number of groups that does not divide the
            channels, a negative eps.
        TypeError: For a wrong type or dtype.
    """
    return group_norm_and_x(x, weight, bias, groups, eps, shift=shift, silu=silu)[0]


def group_norm_and_x(
    x: Sources,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Sources]:
    """Returns ``group_norm``, and x again for those who go on with it, such as a residual.

    The sum of their gradients is then inside of the kernel. The arguments are those of
    ``group_norm``.

    Returns:
        What ``group_norm`` returns, and x itself, or views of it or of its channels_last copy.

    Raises:
        InputError: As ``group_norm`` does.
        TypeError: As ``group_norm`` does.
    """
    sources = x if isinstance(x, tuple) else (x,)
    if isinstance(x, tuple) and len(x) != 2:
        raise InputError(f"x has {len(x)} tensors, expected one, or a tuple of two")
    _check_arguments(sources, weight, bias, groups, eps, shift)
    weight, bias, shift = (None if t is None else t.detach() for t in (weight, bias, shift))
    if not dispatch.has_kernels("group_norm", sources[0]):
        return reference(x, weight, bias, groups, eps, shift, silu), x
    first, second = nhwc(sources[0]), nhwc(sources[1]) if len(sources) == 2 else None
    run = _Differentiable.apply if dispatch.in_graph(first, second) else _forward
    y, _, _, *handed = run(first, second, weight, bias, groups, eps, shift, silu)
    if not handed:
        return y, x
    return y, handed[0] if second is None else (handed[0], handed[1])
