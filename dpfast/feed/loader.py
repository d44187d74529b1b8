"""The order of training samples and the protocol of the loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Loader(Protocol):
    """An endless iterator of (images (B, C, H, W) float32, labels (B,) int64)."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __next__(self) -> tuple[Tensor, Tensor]: ...
    def state(self) -> dict[str, int]: ...
    def restore(self, state: dict[str, int]) -> None: ...


class Order:
    """Shuffled passes over a pool that grows: (seed, epoch, position) -> indices.

    A pass covers every sample once. When the pool has grown, a new pass over all of it begins, so that a new sample
    can be in the very next batch and the choice stays uniform. The state is three integers.
    """

    def __init__(self, seed: int, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size
        self.epoch = self.position = self.size = 0
        self._permutation = torch.empty(0, dtype=torch.int64)

    def next(self, size: int) -> Tensor:
        """(batch_size,) indices into a pool of ``size`` samples; where a pass ends, the batch goes on with the next."""
        if size < 1:
            raise ValueError("the pool is empty")
        if size != self.size:
            self._start(self.epoch + 1 if self.size else 0, size)
        parts, missing = [], self.batch_size
        while missing:
            if self.position == size:
                self._start(self.epoch + 1, size)
            part = self._permutation[self.position : self.position + missing]
            self.position += len(part)
            missing -= len(part)
            parts.append(part)
        return torch.cat(parts)

    def _start(self, epoch: int, size: int, position: int = 0) -> None:
        generator = torch.Generator().manual_seed((self.seed << 32) + epoch)
        self.epoch, self.size, self.position = epoch, size, position
        self._permutation = torch.randperm(size, generator=generator)

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "size": self.size}

    def restore(self, state: dict[str, int]) -> None:
        self._start(state["epoch"], state["size"], state["position"])
