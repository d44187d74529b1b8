"""Samples whose every value follows from their id, so that any subset of them can be checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPE = (3, 6, 6)


@dataclass
class Batch:
    """The fields of a ``SampleBatch``, without the imports of the sampler: a killed child has to
    start fast.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    entropy: Tensor
    learner_step: int = 0
    origins: None = None

    def __len__(self) -> int:
        return len(self.labels)


def pixels(ids: Tensor, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """uint8 (B, *shape), a different image for each of 2^16 ids."""
    element = torch.arange(torch.Size(shape).numel())
    return ((ids[:, None] * 40503 + element * 91) // 7 % 251).to(torch.uint8).view(-1, *shape)


def batch(first: int, count: int, shape: tuple[int, ...] = SHAPE) -> Batch:
    ids = torch.arange(first, first + count)
    entropy = torch.where(ids % 5 == 0, float("nan"), ids / 7.0)
    return Batch(pixels(ids, shape), ids % 10, ids, entropy, learner_step=first)


def latents(ids: Tensor) -> Tensor:
    return (pixels(ids, (4, 2, 2)).float() / 37 - 3).half()


ORIGIN = {"omega": 0.1, "cfg_scale": 1.5, "steps": 15, "seed": 12}


def check_prefix(pool, count: int, codec: str = "pixels") -> None:
    """That the pool holds the ids 0 to ``count``, with the payload and the columns that belong to
    them.
    """
    ids = torch.arange(count)
    assert len(pool) == count
    assert torch.equal(pool.column("sample_id"), ids)
    assert torch.equal(pool.column("label"), ids % 10)
    expected = torch.where(ids % 5 == 0, float("nan"), ids / 7.0)
    assert torch.equal(pool.column("entropy").nan_to_num(-1), expected.nan_to_num(-1))
    assert set(pool.column("steps").tolist()) <= {15}
    if codec == "pixels":
        assert torch.equal(pool.images(ids), pixels(ids))
    elif codec == "latents":
        assert torch.equal(pool.payload(ids), latents(ids))
