"""Prediction entropy of a classifier, and its gradient with respect to the logits.

    p = softmax(z / T),   H_b = -sum_k p_k log p_k  (nats),   dH/dz_k = -p_k (log p_k + H_b) / T

One read and one write of the logits: B K (b_in + b_out) + 4 B bytes. A logit of -inf has p = 0 and gradient 0; a
row with a NaN, a +inf or no finite logit at all yields NaN, in that row only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfast.ops import _check


def reference(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch: fp32 inside (fp64 for fp64 logits)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(z / temperature, dim=-1)
    p = log_p.exp()
    # 0 * -inf is NaN; a NaN row compares unequal to zero and keeps its NaN.
    log_p = torch.where(p == 0, 0.0, log_p)
    entropy = -(p * log_p).sum(dim=-1)
    gradient = p * (log_p + entropy.unsqueeze(-1)) * (-1.0 / temperature)
    return entropy, gradient.to(logits.dtype)


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
        H (B,) fp32 and dH/dlogits (B, K) in the logits' dtype.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape, or a temperature that is not finite and positive.

    Source: the guidance criterion of "Improving the Scaling Laws of Synthetic Data with Deliberate Practice" (2025).
    """
    return reference(logits, _check_arguments(logits, temperature))


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): the first output of `entropy_and_grad` alone, (B,) fp32."""
    return reference(logits, _check_arguments(logits, temperature))[0]
