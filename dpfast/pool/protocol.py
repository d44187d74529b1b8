"""``Pool``: what a loader draws from and a loop adds to, whoever holds the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpfast.ops.dispatch import CPU
from dpfast.parallel import Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.snapshot import PoolSnapshot


class Pool(Protocol):
    """Samples under the indices 0 to ``len(pool)``, of one process or of all ranks.

    ``SamplePool`` holds those of one process, ``ShardedPool`` those of all ranks. Every rank sees
    the same samples under the same indices, and holds some of them in its memory. ``column``,
    ``complete`` and ``fetch`` are collective: all ranks call them together.
    """

    @property
    def ranks(self) -> Ranks:
        """The processes that hold the samples together; ``ALONE`` for one."""
        ...

    @property
    def local(self) -> SamplePool:
        """The samples that this process holds."""
        ...

    @property
    def codec(self) -> str:
        """The form in which a sample is stored: "pixels", "latents" or "jpeg"."""
        ...

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape (C, H, W) of what is stored; None until it is known, and for JPEG."""
        ...

    @property
    def fresh(self) -> int:
        """The number of samples of the newest round."""
        ...

    @property
    def turn(self) -> int:
        """The rank that makes the first batch of the next round."""
        ...

    def __len__(self) -> int: ...

    def held(self, size: int) -> int:
        """Counts the samples of this process among the first ``size``, all rounds before one."""
        ...

    def complete(self, count: int) -> None:
        """Ends a round of ``count`` samples, which all ranks have appended to their ``local``."""
        ...

    def column(self, name: str, start: int = 0) -> Tensor:
        """Returns the values of a column in the order of appending.

        Args:
            name: Name of a column of ``dpfast.pool.record``.
            start: Index of the first value, the start of a round.

        Returns:
            (N - start,) int64 or float32.
        """
        ...

    def images(self, indices: Tensor) -> Tensor:
        """Returns samples of ``local`` as images, decoded where it holds no pixels.

        Args:
            indices: (B,) int64 indices into ``local``.

        Returns:
            (B, C, H, W) uint8.
        """
        ...

    def fetch(
        self,
        indices: Tensor,
        *,
        device: torch.device = CPU,
        parts: Sequence[Tensor] | None = None,
    ) -> tuple[PoolSnapshot, Tensor]:
        """Returns this process's part of the samples ``indices``, which all ranks know.

        Args:
            indices: (B,) int64.
            device: Device on which the part is wanted.
            parts: For each rank which of ``indices`` it gets, (b,) int64; None: those of a training
                batch (``Ranks.part``).

        Returns:
            A snapshot that holds the part's samples, and (b,) int64, their indices in it.
        """
        ...
