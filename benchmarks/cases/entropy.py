"""Entropy and its gradient: the guidance of 65,536 ImageNet logits, and the latency of one small
batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.registry import (
    COMPILED,
    EAGER,
    OURS,
    OURS_OUT,
    Case,
    Variants,
)
from dpfast.ops import entropy_and_grad


def plain(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write by hand."""
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=1)
    return entropy, -p * (log_p + entropy[:, None])


def _case(rows: int, classes: int, targets: dict[str, float], *, latency: bool = False) -> Case:
    def build(device: torch.device) -> Variants:
        logits = torch.randn(rows, classes, device=device) * 3
        out = torch.empty_like(logits)
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        for ours, theirs in zip(entropy_and_grad(logits), compiled(logits), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        return {
            EAGER: lambda: plain(logits),
            COMPILED: lambda: compiled(logits),
            OURS: lambda: entropy_and_grad(logits),
            OURS_OUT: lambda: entropy_and_grad(logits, out=out),
        }

    return Case(
        operation="entropy_and_grad",
        size=f"{rows} x {classes} fp32",
        tests="tests/ops/test_entropy.py",
        build=build,
        bytes=None if latency else rows * classes * 8 + rows * 4,
        targets=targets,
    )


CASES = [
    _case(65536, 1000, {EAGER: 20, COMPILED: 5, "copy": 0.60}),
    _case(256, 10, {EAGER: 8, COMPILED: 8}, latency=True),
]
