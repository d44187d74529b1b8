"""A normalised batch out of a store of uint8 images: 1024 of 100,000 images of 3 x 64 x 64."""

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
from dpfast.ops import gather_batch

BATCH = 1024
IMAGES = 100_000
SHAPE = (3, 64, 64)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(store: Tensor, indices: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """What one would write by hand."""
    batch = (store[indices].float() / 255 - mean) / std
    return batch.contiguous(memory_format=torch.channels_last)


def build(device: torch.device) -> Variants:
    store = torch.empty(IMAGES, *SHAPE, dtype=torch.uint8, device=device).random_(0, 256)
    order = torch.randperm(IMAGES, device=device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    position = 0

    def indices() -> Tensor:
        """Other rows at each call: the caches must not hold them."""
        nonlocal position
        position = (position + BATCH) % (IMAGES - BATCH)
        return order[position : position + BATCH]

    def ours(chosen: Tensor, out: Tensor | None = None) -> Tensor:
        return gather_batch(
            store, chosen, mean=MEAN, std=STD, dtype=torch.float32, channels_last=True, out=out
        )

    chosen = indices()
    out = torch.empty_like(ours(chosen))
    torch.testing.assert_close(ours(chosen), plain(store, chosen, mean, std), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours(chosen), compiled(store, chosen, mean, std), rtol=1e-5, atol=1e-5
    )
    return {
        EAGER: lambda: plain(store, indices(), mean, std),
        COMPILED: lambda: compiled(store, indices(), mean, std),
        OURS: lambda: ours(indices()),
        OURS_OUT: lambda: ours(indices(), out),
    }


CASES = [
    Case(
        operation="gather_batch",
        size="1024 of 100,000 x 3x64x64 uint8 -> fp32 NHWC",
        tests="tests/ops/test_gather.py",
        build=build,
        bytes=BATCH * (torch.Size(SHAPE).numel() * 5 + 8),
        targets={EAGER: 20, COMPILED: 10, "copy": 0.50},
    )
]
