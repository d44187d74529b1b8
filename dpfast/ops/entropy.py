"""Prediction entropy of a classifier, and its gradient with respect to the logits.

    p = softmax(z / T),   H_b = -sum_k p_k log p_k  (nats),   dH/dz_k = -p_k (log p_k + H_b) / T

One read and one write of the logits: B K (b_in + b_out) + 4 B bytes. A logit of -inf has p = 0 and
gradient 0; a row with a NaN, a +inf or no finite logit at all yields NaN, in that row only.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.triton_stub import next_power, tl, triton

LOWEST = tl.constexpr(-3.4028234663852886e38)
FLOOR = tl.constexpr(-87.0)  # exp(-87) is the last normal float; below it p counts as zero
ONE_BLOCK = 16384  # columns that a program still holds in registers
CHUNK = 4096


def reference(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns the formula in plain PyTorch: fp32 elements and fp64 sums (all fp64 for fp64 logits).

    With d = (z - max z) / T, S = sum e^d and W = sum d e^d, H = log S - W / S: no term is negative,
    so nothing cancels.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    d = (z - z.amax(dim=-1, keepdim=True)) / temperature
    e = d.exp()
    d = torch.where(e == 0, 0.0, d)  # 0 * -inf is NaN; a NaN compares unequal to zero and stays
    total = e.sum(dim=-1, keepdim=True, dtype=torch.float64)
    mean = (e * d).sum(dim=-1, keepdim=True, dtype=torch.float64) / total
    entropy = (total.log() - mean).squeeze(-1)
    gradient = e * (d - mean.to(z.dtype)) * (-1.0 / (temperature * total)).to(z.dtype)
    return entropy.to(z.dtype), gradient.to(logits.dtype)


@triton.jit
def _exponential(z, top, inverse_temperature):
    """Returns d = (z - top) / T, never below FLOOR, and e^d. Comparisons, not maxima: they let a
    NaN through.
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
    """Reads ROWS whole rows a program. The row stride comes in units of UNIT, which tells the
    compiler its alignment.
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
    """Reads one row a program, too long for registers: running sums, and a second read for the
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
    """Returns rows and columns of a program and its warps; the audit shows that none of them
    spills.
    """
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
    stride = logits.stride(0) // unit
    scale = 1.0 / temperature
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


def _gradient_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits) if logits.is_contiguous() else logits.new_empty(logits.shape)


def _run(logits: Tensor, temperature: float, dlogits: Tensor | None) -> Tensor:
    """Returns the entropy, by the backend of the device; the gradient goes to `dlogits`,
    contiguous, where one is given.
    """
    backend = dispatch.backend_for(logits.device)
    if backend == "reference":
        values, gradient = reference(logits, temperature)
        if dlogits is not None:
            dlogits.copy_(gradient)
        return values
    rows, classes = logits.shape
    stride, step = logits.stride()
    if step != 1 and classes > 1:
        logits = logits.contiguous()
        stride = classes
    entropy = logits.new_empty(rows, dtype=torch.float32)
    if backend == "triton":
        launch(logits, temperature, entropy, dlogits)
        return entropy
    dispatch.native_module().entropy(
        logits.data_ptr(),
        rows,
        classes,
        stride,
        dispatch.DTYPE_CODES[logits.dtype],
        1.0 / temperature,
        entropy.data_ptr(),
        0 if dlogits is None else dlogits.data_ptr(),
        torch.get_num_threads(),
    )
    return entropy


@torch.library.custom_op("dpfast::entropy", mutates_args=())
def _operation(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Returns entropy, and the gradient or an empty tensor."""
    if not gradient:
        return _run(logits, temperature, None), logits.new_empty(0)
    dlogits = _gradient_like(logits)
    return _run(logits, temperature, dlogits), dlogits


@_operation.register_fake
def _(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(
        (rows, classes) if gradient else 0
    )


@_operation.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], logits: Tensor, temperature: float, gradient: bool
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    lanes = logits.movedim(cast(int, in_dims[0]), 0)
    rows, classes = lanes.shape[1:]
    values, dlogits = _operation(lanes.reshape(-1, classes), temperature, gradient)
    shape = (info.batch_size, rows, classes) if gradient else (info.batch_size, 0)
    return (values.reshape(info.batch_size, rows), dlogits.reshape(shape)), (0, 0)


class _Differentiable(torch.autograd.Function):
    """The registered operation with its derivative; a registered derivative would not work inside
    torch.func.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
        return _operation(logits, temperature, gradient)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, float, bool], output: tuple[Tensor, Tensor]
    ) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1] if inputs[2] else inputs[0])
        ctx.temperature, ctx.has_gradient = inputs[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        dlogits = (
            saved if ctx.has_gradient else _Differentiable.apply(saved, ctx.temperature, True)[1]
        )
        return grads[0].unsqueeze(1).to(dlogits.dtype) * dlogits, None, None


def _check_arguments(logits: Tensor, temperature: float) -> float:
    check.tensor("logits", logits, check.FLOATS)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise InputError(f"logits has shape {tuple(logits.shape)}, expected (B, K) with K >= 1")
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be finite and positive, got {temperature}")
    return float(temperature)


def entropy_and_grad(
    logits: Tensor, *, temperature: float = 1.0, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the entropy in nats of softmax(logits / temperature) and its gradient.

    It is the criterion of guidance in "Improving the Scaling Laws of Synthetic Data with Deliberate
    Practice" (arXiv 2502.15588).

    Args:
        logits: (B, K) fp32, fp16 or bf16; rows may be strided, -inf marks an impossible class.
        temperature: Positive divisor of the logits.
        out: Tensor for the gradient, contiguous and otherwise like the logits; may be the logits
            themselves.

    Returns:
        H (B,) fp32 and dH/dlogits (B, K) in the logits' dtype, ``out`` if given. H is
        differentiable once, dH/dlogits is not; asking for more raises ``RuntimeError``.

    Raises:
        InputError: For a wrong shape or device, an ``out`` that is not contiguous, and a
            temperature that is not finite and positive.
        TypeError: For a wrong type or dtype.

    Examples:
        >>> import torch, dpfast
        >>> values, gradient = dpfast.entropy_and_grad(torch.tensor([[1.0, 0.0]]))
        >>> values, gradient
        (tensor([0.5822]), tensor([[-0.1966,  0.1966]]))
    """
    temperature = _check_arguments(logits, temperature)
    if out is not None:
        check.target("out", out, logits.dtype, logits.shape, logits.device)
    if dispatch.traced(logits):
        values, dlogits = _Differentiable.apply(logits, temperature, True)
        return values, dlogits if out is None else out.copy_(dlogits)
    dlogits = _gradient_like(logits) if out is None else out
    return _run(logits, temperature, dlogits), dlogits


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Returns the entropy in nats of softmax(logits / temperature), without its gradient.

    Args:
        logits: (B, K) fp32, fp16 or bf16, as in ``entropy_and_grad``.
        temperature: Positive divisor of the logits.

    Returns:
        (B,) fp32, differentiable once.

    Raises:
        InputError: For a wrong shape, and a temperature that is not finite and positive.
        TypeError: For a wrong type or dtype.

    Examples:
        >>> import torch, dpfast
        >>> dpfast.entropy(torch.zeros(2, 10))  # log 10
        tensor([2.3026, 2.3026])
    """
    temperature = _check_arguments(logits, temperature)
    if dispatch.traced(logits):
        return _Differentiable.apply(logits, temperature, False)[0]
    return _run(logits, temperature, None)
