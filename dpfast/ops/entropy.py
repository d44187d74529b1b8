"""Prediction entropy of a classifier, and its gradient with respect to the logits.

    p = softmax(z / T),   H_b = -sum_k p_k log p_k  (nats),   dH/dz_k = -p_k (log p_k + H_b) / T

One read and one write of the logits: B K (b_in + b_out) + 4 B bytes. A logit of -inf has p = 0 and gradient 0; a
row with a NaN, a +inf or no finite logit at all yields NaN, in that row only.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from dpfast.ops import _check, _dispatch


def reference(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch: fp32 elements and fp64 sums (all fp64 for fp64 logits).

    With d = (z - max z) / T, S = sum e^d and W = sum d e^d, H = log S - W / S: no term is negative, so nothing cancels.
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


def _native(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    if logits.stride(1) != 1 and classes > 1:
        logits = logits.contiguous()
    entropy = torch.empty(rows, dtype=torch.float32)
    dlogits = torch.empty((rows, classes) if gradient else 0, dtype=logits.dtype)
    _dispatch.native_module().entropy(
        logits.data_ptr(),
        rows,
        classes,
        logits.stride(0),
        _dispatch.DTYPE_CODES[logits.dtype],
        1.0 / temperature,
        entropy.data_ptr(),
        dlogits.data_ptr() if gradient else 0,
        torch.get_num_threads(),
    )
    return entropy, dlogits


def _run(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """Entropy, and the gradient or an empty tensor, by the backend of the logits' device."""
    backend = _dispatch.backend_for(logits.device)
    if backend == "native":
        return _native(logits, temperature, gradient)
    values, dlogits = reference(logits, temperature)
    return values, dlogits if gradient else dlogits.new_empty(0)


@torch.library.custom_op("dpfast::entropy", mutates_args=())
def _operation(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    return _run(logits, temperature, gradient)


@_operation.register_fake
def _(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
    rows, classes = logits.shape
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((rows, classes) if gradient else 0)


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
    """The registered operation with its derivative; a registered derivative would not work inside torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
        return _operation(logits, temperature, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1] if inputs[2] else inputs[0])
        ctx.temperature, ctx.has_gradient = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        dlogits = saved if ctx.has_gradient else _Differentiable.apply(saved, ctx.temperature, True)[1]
        return grads[0].unsqueeze(1).to(dlogits.dtype) * dlogits, None, None


def _check_arguments(logits: Tensor, temperature: float) -> float:
    _check.tensor("logits", logits, _check.FLOATS)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, K) with K >= 1")
    if isinstance(temperature, Tensor) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and positive, got {temperature}")
    return float(temperature)


def entropy_and_grad(logits: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Entropy in nats of softmax(logits / temperature) and its gradient with respect to the logits.

    Args:
        logits: (B, K) fp32, fp16 or bf16; rows may be strided, -inf marks an impossible class.
        temperature: positive divisor of the logits.

    Returns:
        H (B,) fp32 and dH/dlogits (B, K) in the logits' dtype. H is differentiable once, dH/dlogits is not.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, or a temperature that is not finite and positive.

    Source: the guidance criterion of "Improving the Scaling Laws of Synthetic Data with Deliberate Practice" (2025).
    """
    temperature = _check_arguments(logits, temperature)
    run = _Differentiable.apply if _dispatch.traced(logits) else _run
    return run(logits, temperature, True)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): the first output of `entropy_and_grad` alone, (B,) fp32."""
    temperature = _check_arguments(logits, temperature)
    run = _Differentiable.apply if _dispatch.traced(logits) else _run
    return run(logits, temperature, False)[0]
