"""The operations between two branches of a transformer's block: the end of one, a gated residual,
and the beginning of the next, a LayerNorm with a modulation.

    u = x + g h                                     the stream; without a branch h it is x itself
    n = (u + o - mean) / sqrt(var + eps)            o: biases that the stream still lacks
    y = (w n + b) (1 + s) + t                       mean, var: of a row of D channels

g, s and t are rows of a sample (the AdaLN-Zero block of DiT and Stable Diffusion 3), o, w and b of
all. The gradient of u, where v is that which reaches it from elsewhere, and m = dy w (1 + s):

    du = v + (m - mean(m) - n mean(m n)) / sqrt(var + eps),   dx = du,   dh = g du

Bytes for n elements of b bytes: 2 n b forward without a branch and 4 n b with one; backward 3 n b,
and 1 n b each for v and, where there is a gate, for dh. PyTorch's passes for a whole block of DiT
(product, sum, norm, product, sum) are 13 n b forward.

``gate_norm_quantise`` writes y in float8 with a factor a row (``dpfast.ops.quantise``), for a
product that reads it so: n + 4 bytes a row in the place of n b.
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
from dpfast.ops.quantise import FLOAT8, Quantised, quantise, store_row
from dpfast.ops.traffic import register_traffic
from dpfast.ops.triton_stub import next_power, tl, triton


def reference(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the formula in plain PyTorch, rounded where its operations round."""
    if branch is not None:
        x = x + (branch if gate is None else gate[:, None] * branch)
    moved = x if offset is None else (x + offset).to(x.dtype)
    y = F.layer_norm(moved, x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale[:, None])
    return x, y if shift is None else y + shift[:, None]


@triton.jit
def _vector(source, at, real):
    """Returns a row of numbers in fp32."""
    return tl.load(source + at, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _normed(u, offset, column, real, eps, D: tl.constexpr):
    """Returns n of a row, and 1 / sqrt(var + eps)."""
    if offset is not None:
        u += _vector(offset, column, real)
    centered = tl.where(real, u - tl.sum(u, axis=0) / D, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / D + eps)
    return centered * inverse, inverse


@triton.jit
def gate_norm_modulate_kernel(
    x,
    branch,
    gate,
    offset,
    weight,
    bias,
    scale,
    shift,
    stream,
    out,
    scales,
    tokens,
    stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes u and y of one row, y in float8 where there are scales to write; stride: from a
    sample's gate, scale and shift to the next one's.
    """
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    column = tl.arange(0, BLOCK)
    real = column < D
    u = _vector(x, row * D + column, real)
    if branch is not None:
        h = _vector(branch, row * D + column, real)
        if gate is not None:
            h *= _vector(gate, sample * stride + column, real)
        # the norm is that of the stream as it is kept
        kept = (u + h).to(x.dtype.element_ty)
        if stream is not None:
            tl.store(stream + row * D + column, kept, mask=real)
        u = kept.to(tl.float32)
    y, _ = _normed(u, offset, column, real, eps, D)
    if weight is not None:
        y *= _vector(weight, column, real)
    if bias is not None:
        y += _vector(bias, column, real)
    if scale is not None:
        y *= 1.0 + _vector(scale, sample * stride + column, real)
    if shift is not None:
        y += _vector(shift, sample * stride + column, real)
    if scales is not None:
        store_row(y, out, scales, row, column, real, D)
    else:
        tl.store(out + row * D + column, y.to(out.dtype.element_ty), mask=real)


@triton.jit
def backward_kernel(
    u,
    dy,
    dstream,
    gate,
    offset,
    weight,
    scale,
    dx,
    dbranch,
    tokens,
    stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes dx and, where there is a gate, dh of one row."""
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    column = tl.arange(0, BLOCK)
    real = column < D
    n, inverse = _normed(_vector(u, row * D + column, real), offset, column, real, eps, D)
    m = _vector(dy, row * D + column, real)
    if weight is not None:
        m *= _vector(weight, column, real)
    if scale is not None:
        m *= 1.0 + _vector(scale, sample * stride + column, real)
    along = tl.sum(m * n, axis=0) / D
    du = (m - tl.sum(m, axis=0) / D - n * along) * inverse
    if dstream is not None:
        du += _vector(dstream, row * D + column, real)
    tl.store(dx + row * D + column, du.to(dx.dtype.element_ty), mask=real)
    if gate is not None:
        dh = du * _vector(gate, sample * stride + column, real)
        tl.store(dbranch + row * D + column, dh.to(dx.dtype.element_ty), mask=real)


def settings(channels: int, backward: bool = False) -> tuple[int, int]:
    """Returns lanes and warps of a row: 16 channels a thread, of the backward pass 8, which holds
    more of each.
    """
    block = next_power(channels)
    return block, min(max(1, block // (256 if backward else 512)), 16)


def _strided(*rows: Tensor | None) -> tuple[int, tuple[Tensor | None, ...]]:
    """Returns the one distance from sample to sample of rows (B, D), copied where theirs differ."""
    given = [row for row in rows if row is not None]
    strides = {row.stride(0) for row in given}
    if len(strides) > 1 or any(row.stride(1) != 1 for row in given):
        rows = tuple(None if row is None else row.contiguous() for row in rows)
        strides = {row.stride(0) for row in rows if row is not None}
    return (strides.pop() if strides else 0), rows


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the stream, empty where there is no branch or it is not to be kept, and y."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = (x, branch, gate, offset, weight, bias, scale, shift)
    return _launch(*given, eps, keep, out, None), out


def _quantised(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    values_dtype: torch.dtype = FLOAT8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the stream, empty where there is no branch, and y as values and scales.

    values_dtype: float8, or for tests fp32: what is rounded to it.
    """
    values = torch.empty_like(x, dtype=values_dtype, memory_format=torch.contiguous_format)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    given = (x, branch, gate, None, None, None, scale, shift)
    return _launch(*given, eps, True, values, scales), values, scales


def _launch(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    keep: bool,
    out: Tensor,
    scales: Tensor | None,
) -> Tensor:
    """Writes y into ``out``; the stream, as ``_forward`` returns it."""
    x, branch = x.contiguous(), dispatch.contiguous(branch)
    stride, (gate, scale, shift) = _strided(gate, scale, shift)
    stream = torch.empty_like(x) if branch is not None and keep else None
    if x.numel():
        tokens, channels = x.shape[1:]
        block, warps = settings(channels)
        gate_norm_modulate_kernel[(len(x) * tokens,)](
            x,
            branch,
            gate,
            offset,
            weight,
            bias,
            scale,
            shift,
            stream,
            out,
            scales,
            tokens,
            stride,
            eps,
            channels,
            block,
            num_warps=warps,
        )
    return x.new_empty(0) if stream is None else stream


def _backward(
    u: Tensor,
    dy: Tensor,
    dstream: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns dx and dh, the latter empty where there is no gate: it is dx then."""
    u, dy, dstream = u.contiguous(), dy.contiguous(), dispatch.contiguous(dstream)
    stride, (gate, scale) = _strided(gate, scale)
    dx = torch.empty_like(u)
    dbranch = u.new_empty(0) if gate is None else torch.empty_like(u)
    if u.numel():
        tokens, channels = u.shape[1:]
        block, warps = settings(channels, backward=True)
        backward_kernel[(len(u) * tokens,)](
            u,
            dy,
            dstream,
            gate,
            offset,
            weight,
            scale,
            dx,
            dbranch,
            tokens,
            stride,
            eps,
            channels,
            block,
            num_warps=warps,
        )
    return dx, dbranch


# Called in a graph, where something looks at it; `_forward` otherwise.
_operation = torch.library.custom_op("dpfast::gate_norm_modulate", _forward, mutates_args=())
_derivative = torch.library.custom_op(
    "dpfast::gate_norm_modulate_backward", _backward, mutates_args=()
)


@_operation.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    offset: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if branch is not None and keep else 0), x.new_empty(x.shape)


@torch.library.custom_op("dpfast::gate_norm_quantise", mutates_args=())
def _quantising(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _quantised(x, branch, gate, scale, shift, eps)


@_quantising.register_fake
def _(x: Tensor, branch: Tensor | None, *_: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    stream = x.new_empty(0 if branch is None else x.shape)
    return stream, x.new_empty(x.shape, dtype=FLOAT8), scales


@_derivative.register_fake
def _(
    u: Tensor, dy: Tensor, dstream: Tensor | None, gate: Tensor | None, *_: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(0 if gate is None else u.shape)


def bytes_moved(elements: int, itemsize: int, *, branch: bool, keep: bool = True) -> int:
    """Returns the bytes that a forward launch reads and writes, but for rows of a sample and
    vectors.
    """
    return (2 + branch + (branch and keep)) * elements * itemsize


def backward_bytes_moved(elements: int, itemsize: int, *, stream: bool, gate: bool) -> int:
    """Returns the bytes that a backward launch reads and writes, but for rows of a sample and
    vectors.
    """
    return (3 + stream + gate) * elements * itemsize


@register_traffic(torch.ops.dpfast.gate_norm_modulate)
def _traffic(x: Tensor, branch: Tensor | None, *rest: Any, out: Any) -> tuple[int]:
    has = {"branch": branch is not None, "keep": rest[-1]}
    return (bytes_moved(x.numel(), x.itemsize, **has),)


@register_traffic(torch.ops.dpfast.gate_norm_modulate_backward)
def _backward_traffic(
    u: Tensor, dy: Tensor, dstream: Tensor | None, gate: Tensor | None, *_: Any, **__: Any
) -> tuple[int]:
    has = {"stream": dstream is not None, "gate": gate is not None}
    return (backward_bytes_moved(u.numel(), u.itemsize, **has),)


@register_traffic(torch.ops.dpfast.gate_norm_quantise)
def _quantising_traffic(x: Tensor, branch: Tensor | None, *_: Any, out: Any) -> tuple[int]:
    stream = (1 if branch is None else 3) * x.numel() * x.itemsize
    return (stream + x.numel() + 4 * out[2].numel(),)


class _Differentiable(torch.autograd.Function):
    """The registered operation with its derivative in x and the branch; all else is frozen."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        offset: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        out = _operation(x, branch, gate, offset, weight, bias, scale, shift, eps, keep)
        # x too is handed on, so that the gradient of its other uses is summed in the kernel
        return out if branch is not None else (x.view_as(x), out[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, branch, gate, offset, weight, _, scale, _, ctx.eps, _ = inputs
        ctx.branched = branch is not None
        ctx.set_materialize_grads(False)  # no zeros where nothing else asks for the stream
        u = output[0] if ctx.branched else x
        ctx.save_for_backward(u, gate if ctx.branched else None, offset, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        u, gate, offset, weight, scale = ctx.saved_tensors
        dstream, dy = grads
        if dy is None:
            dy = torch.zeros_like(u)
        dx, dbranch = _derivative(u, dy, dstream, gate, offset, weight, scale, ctx.eps)
        if not ctx.branched:
            return dx, *[None] * 9
        return dx, dx if gate is None else dbranch, *[None] * 8


def gate_norm_modulate(
    x: Tensor,
    branch: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    offset: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns a gated residual, the LayerNorm of the result and its modulation.

    It is the adaLN-Zero block of Peebles and Xie, "Scalable Diffusion Models with Transformers"
    (2023).

    Args:
        x: (B, T, D) fp32, fp16 or bf16: the stream.
        branch: Like x, or None: added to it.
        gate: (B, D) factors of the branch, or None for 1.
        offset: (D,) that the norm adds to the stream first, or None; the stream does not keep it.
        weight: (D,) of the norm, or None for 1.
        bias: (D,) of the norm, or None for 0.
        scale: (B, D), or None for 0: the norm's result is multiplied by 1 + scale.
        shift: (B, D), or None for 0: added behind that.
        eps: Number that is added to the variance.
        keep: True where the stream is asked for. Behind the last norm it is not: without a tape it
            is then not written.

    Returns:
        The stream u (B, T, D), which is x itself without a branch, or a view of it (and may be
        empty where it is not kept), and y (B, T, D), both in x's dtype. Who goes on with u instead
        of x saves a sum of gradients. Differentiable once, in x and the branch only: all else
        counts as constants (frozen). A row's bits depend on no other row.

    Raises:
        InputError: For a wrong shape or device, a gate without a branch, a negative eps.
        TypeError: For a wrong type or dtype.
    """
    gate, scale, shift = _checked(x, branch, gate, scale, shift, eps)
    channels = x.shape[2]
    offset, weight, bias = (
        _constant(name, value, x, (channels,))
        for name, value in (("offset", offset), ("weight", weight), ("bias", bias))
    )
    given = (x, branch, gate, offset, weight, bias, scale, shift, float(eps))
    if not dispatch.has_kernels("gate_norm_modulate", x):
        return reference(*given)
    taped = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given[:2])
    graph = dispatch.in_graph(x, branch)
    stream, y = (_Differentiable.apply if graph else _forward)(*given, keep or taped)
    return stream if graph or branch is not None else x, y


def gate_norm_quantise(
    x: Tensor,
    branch: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Quantised]:
    """Returns ``gate_norm_modulate`` without a tape, with y in float8 and one factor a token.

    Args:
        x: As in ``gate_norm_modulate``.
        branch: As in ``gate_norm_modulate``.
        gate: As in ``gate_norm_modulate``.
        scale: As in ``gate_norm_modulate``.
        shift: As in ``gate_norm_modulate``.
        eps: As in ``gate_norm_modulate``.

    Returns:
        The stream u (B, T, D) in x's dtype, which is x itself without a branch, and y as
        ``Quantised``, from fp32 (on a CPU from x's dtype). Without a gradient.

    Raises:
        InputError: As ``gate_norm_modulate`` does.
        TypeError: For a wrong type or dtype.
    """
    check.tensor("x", x, check.FLOATS)
    gate, scale, shift = _checked(x, branch, gate, scale, shift, eps)
    x, branch = x.detach(), None if branch is None else branch.detach()
    if not dispatch.has_kernels("gate_norm_modulate", x):
        plain = (None, None, None)
        stream, y = reference(x, branch, gate, *plain, scale, shift, float(eps))
        return stream, quantise(y)
    run = _quantising if dispatch.in_graph(x, branch) else _quantised
    stream, *y8 = run(x, branch, gate, scale, shift, float(eps))
    return x if branch is None else stream, Quantised(*y8)


def _checked(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Returns gate, scale and shift as constants."""
    check.tensor("x", x, (*check.FLOATS, torch.float64))
    if x.dim() != 3 or x.shape[2] == 0:
        raise InputError(f"x has shape {tuple(x.shape)}, expected (B, T, D)")
    batch, _, channels = x.shape
    if branch is not None:
        check.shaped("branch", check.tensor("branch", branch, (x.dtype,), x.device), x.shape)
    elif gate is not None:
        raise InputError("gate is given without a branch")
    check.number("eps", eps)
    if eps < 0:
        raise InputError(f"eps = {eps}: expected a number that is not negative")
    return tuple(
        _constant(name, value, x, (batch, channels))
        for name, value in (("gate", gate), ("scale", scale), ("shift", shift))
    )


def _constant(name: str, value: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    if value is None:
        return None
    dtypes = (*check.FLOATS, torch.float64)
    return check.shaped(name, check.tensor(name, value, dtypes, x.device), shape).detach()
