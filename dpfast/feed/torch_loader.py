"""The loader in plain torch: gathers a batch from the pool and augments it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpfast.feed.augment import random_flips, random_shift
from dpfast.feed.order import Order
from dpfast.pool.pool import SamplePool


class TorchLoader:
    """Endless batches from a pool. A sample appended to the pool can be in the next batch.

    The batch that follows is a function of (seed, state, pool): ``restore(state())`` repeats it exactly.
    """

    def __init__(self, pool: SamplePool, *, batch_size: int, seed: int, flip: bool = True, shift: int = 0) -> None:
        self.pool, self.seed, self.flip, self.shift = pool, seed, flip, shift
        self.order = Order(seed, batch_size)
        self.batches = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        indices = self.order.next(len(self.pool))
        generator = torch.Generator().manual_seed((self.seed << 32) + (1 << 31) + self.batches)
        self.batches += 1
        flips = random_flips(len(indices), generator) if self.flip else None
        images, labels = self.pool.gather(indices, flip=flips)
        return random_shift(images, self.shift, generator), labels

    def state(self) -> dict[str, int]:
        return {"batches": self.batches, **self.order.state()}

    def restore(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]
        self.order.restore(state)
