"""Prediction entropy of a classifier, and its gradient with respect to the logits.

    p = softmax(z / T),   H_b = -sum_k p_k log p_k  (nats),   dH/dz_k = -p_k (log p_k + H_b) / T

One read and one write of the logits: B K (b_in + b_out) + 4 B bytes. A logit of -inf has p = 0 and
gradient 0; a row with a NaN, a +inf or no finite logit at all yields NaN, in that row only.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.kernels.entropy import launch
from dpfast.ops.reference.entropy import reference


def _gradient_like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits) if logits.is_contiguous() else logits.new_empty(logits.shape)


def _run(logits: Tensor, temperature: float, dlogits: Tensor | None) -> Tensor:
    """The entropy, by the backend of the device; the gradient goes to `dlogits`, contiguous, where
    one is given.
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
        logits, stride = logits.contiguous(), classes
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
    """Entropy, and the gradient or an empty tensor."""
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
    """Entropy in nats of softmax(logits / temperature) and its gradient with respect to the logits.

    Args:
        logits: (B, K) fp32, fp16 or bf16; rows may be strided, -inf marks an impossible class.
        temperature: positive divisor of the logits.
        out: where to write the gradient, contiguous and otherwise like the logits; may be the
        logits themselves.

    Returns:
        H (B,) fp32 and dH/dlogits (B, K) in the logits' dtype, `out` if given. H is differentiable
        once, dH/dlogits is not; asking for more raises RuntimeError.

    Raises:
        TypeError: wrong type or dtype. InputError: wrong shape or device, an `out` that is not
        contiguous, or a temperature that is not finite and positive.

    Source: the guidance criterion of "Improving the Scaling Laws of Synthetic Data with Deliberate
    Practice" (2025).
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
    """Entropy in nats of softmax(logits / temperature): the first output of `entropy_and_grad`
    alone, (B,) fp32.
    """
    temperature = _check_arguments(logits, temperature)
    if dispatch.traced(logits):
        return _Differentiable.apply(logits, temperature, False)[0]
    return _run(logits, temperature, None)
