"""Normals that belong to a sample id: 256 latents of 4 x 64 x 64."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.registry import EAGER, OURS, Case, Variants
from dpfast.ops import normal

SAMPLES, SHAPE = 256, (4, 64, 64)


def build(device: torch.device) -> Variants:
    ids = torch.arange(SAMPLES, device=device)
    generator = torch.Generator(device)

    def per_sample() -> Tensor:
        """The same promise with torch alone: one seeded generator a sample."""
        out = torch.empty((SAMPLES, *SHAPE), device=device)
        for i in range(SAMPLES):
            torch.randn(SHAPE, generator=generator.manual_seed(i), out=out[i])
        return out

    for values in (per_sample(), normal(ids, SHAPE, seed=0, stream=0)):
        assert values.mean().abs() < 0.01
        assert (values.std() - 1).abs() < 0.01
    return {EAGER: per_sample, OURS: lambda: normal(ids, SHAPE, seed=0, stream=0)}


CASES = [
    Case(
        operation="normal",
        size="256 x 4x64x64",
        tests="tests/ops/test_noise.py",
        build=build,
        targets={EAGER: 4},
    )
]
