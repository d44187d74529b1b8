"""`entropy_and_grad` in plain PyTorch; the formula stands in dpfast/ops/entropy.py."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch: fp32 elements and fp64 sums (all fp64 for fp64 logits).

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
