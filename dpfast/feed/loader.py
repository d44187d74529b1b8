"""What every loader is: the protocol, and the part that they share.

Batches are prepared ahead, and that is invisible: batch n is a function of (seed, position, pool at
the call of ``next``). When the pool has grown, what was prepared is dropped and drawn anew, so a
sample can be in the very next batch after its append; it costs the preparation of what was dropped.

Where several ranks hold the pool's samples, the order, the chances and the mixing are those of the
whole batch, and a loader delivers its rank's part of it (``dpfast.pool.sharded``). All ranks then
ask for the same batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.feed.augment import Augment, AugmentationDraw
from dpfast.feed.order import Order
from dpfast.ops.dispatch import CPU
from dpfast.pool.batch import BatchFormat
from dpfast.pool.protocol import Pool
from dpfast.pool.snapshot import PoolSnapshot


class LoaderError(RuntimeError):
    """A batch could not be made; ``__cause__`` says why. The position stays where it was."""


class Loader(Protocol):
    """An endless iterator of (images (B, C, H, W), labels (B,) int64); (B, classes) float32 where
    batches are mixed.

    Images and labels are on one device; the caller may write to them. waited: seconds that callers
    have spent in ``next``, which raises ``LoaderError``.
    """

    waited: float

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __next__(self) -> tuple[Tensor, Tensor]: ...
    def state_dict(self) -> dict[str, int]:
        """The position after the last batch, a few integers."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position, of this loader or of another one with the same seed, batch size
        and pool.
        """
        ...

    def close(self) -> None:
        """Drops what was prepared and ends the loader's threads."""
        ...


@dataclass
class PendingBatch:
    """One batch in preparation. after: the position behind it; work: what the loader holds of it,
    once it is started.

    pool_size: samples in the pool that it is drawn from. indices: (batch_size,) int64, of the whole
    batch; draw: the chances of the part that is delivered.
    """

    pool_size: int
    indices: Tensor
    draw: AugmentationDraw
    after: dict[str, int]
    work: Any = field(default=None)


class PoolLoader(Loader):
    """The shared part: order, chances, preparation ahead, positions, mixing. A subclass makes the
    images.

    Args:
        pool: must hold a sample before the first batch.
        batch_size, seed: with the position they determine every batch, of which a rank delivers an
        even part.
        augment: what changes in a batch by chance; nothing by default.
        form: scale, dtype and memory layout of the batches; the default is [-1, 1], float32,
        channels last.
        device: where the batches are.
        classes: how many; needed where ``augment`` mixes.
        fresh_weight: see ``Order``.
        ahead: batches that are prepared while the caller works.

    Raises ``InputError`` for a batch size or ``ahead`` below 1, a weight that is not above 0, and
    mixing without ``classes``.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        form: BatchFormat | None = None,
        device: torch.device | str = CPU,
        classes: int | None = None,
        fresh_weight: float = 1.0,
        ahead: int = 2,
    ) -> None:
        if ahead < 1:
            raise InputError(f"ahead = {ahead}, expected at least 1")
        self.augment = augment or Augment()
        if self.augment.mixes and classes is None:
            raise InputError("mixup and cutmix need classes, the number of classes")
        self.pool, self.seed, self.classes = pool, seed, classes
        self.form, self.device = form or BatchFormat(), torch.device(device)
        self.order = Order(seed, batch_size, fresh_weight=fresh_weight)
        self.waited = 0.0
        self._number = 0  # of the next batch that is prepared
        self._queue: deque[PendingBatch] = deque()
        self._position = {
            "batches": 0,
            **self.order.state_dict(),
        }  # behind the last batch that was delivered
        self._shape: tuple[int, int, int] | None = None
        self.ahead = ahead
        self.on_demand = False  # whether batches are made when one is asked for, and not before

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        size = len(self.pool)
        if self._queue and self._queue[0].pool_size != size:
            self._rewind()
        if not self._queue:
            self._prepare(size)
        try:
            images, labels = self._finish(self._queue[0])
        except BaseException as error:
            raise self._failed(error) from error
        request = self._queue.popleft()
        if request.draw.mix is not None:
            assert self.classes is not None
            images, labels = request.draw.mix.apply(images, labels, self.classes)
        if not self.on_demand and len(self._queue) <= self.ahead // 2:
            self._prepare(size)
        self._position = request.after
        self.waited += time.perf_counter() - started
        return images, labels

    def state_dict(self) -> dict[str, int]:
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._shape = None
        self._position = dict(state)
        self._rewind()

    def close(self) -> None:
        self._rewind()

    def release(self) -> None:
        """Gives back the memory of batches that were prepared; they are made again when they are
        asked for.
        """
        self._rewind()

    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pool's images, before any crop."""
        if self._shape is None:
            shape = self.pool.shape if self.pool.codec == "pixels" else None
            self._shape = tuple(
                shape or self.pool.images(torch.zeros(1, dtype=torch.int64)).shape[1:]
            )  # type: ignore[assignment]
        assert self._shape is not None
        return self._shape

    def batch_shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W) of what is delivered."""
        channels, *size = self.image_shape()
        return (self.count, channels, *(self.augment.size or size))

    @property
    def count(self) -> int:
        """Samples of a batch that are delivered."""
        return self.order.batch_size // self.pool.ranks.size

    def _prepare(self, size: int) -> None:
        """Fills the queue."""
        count = self.ahead - len(self._queue)
        if count < 1:
            return
        try:
            new = self._requests(size, count)
            self._queue.extend(new)
            self._start(new)
        except BaseException as error:
            raise self._failed(error) from error

    def _requests(self, size: int, count: int) -> list[PendingBatch]:
        """What the next batches are made of."""
        fresh = self.pool.fresh if self.order.fresh_weight != 1 else 0
        indices, image, requests = (
            self.order.next(size, fresh, batches=count),
            self.image_shape()[1:],
            [],
        )
        for left, part in zip(
            reversed(range(count)), indices.split(self.order.batch_size), strict=True
        ):
            draw = self.augment.draw(len(part), image, seed=self.seed, number=self._number)
            draw = draw.part(self.pool.ranks.part(len(part)))
            self._number += 1
            after = {"batches": self._number, **self.order.state_dict(before=left)}
            requests.append(PendingBatch(size, part, draw, after))
        return requests

    def _failed(self, error: BaseException) -> LoaderError:
        """What to raise, once all is taken back."""
        self._rewind()
        return LoaderError(f"a batch after the first {self._number} could not be made: {error!r}")

    def _rewind(self) -> None:
        """Takes everything back that was prepared and not delivered."""
        self._drop()
        self._queue.clear()
        self._number = self._position["batches"]
        self.order.load_state_dict(self._position)

    def _held(self, request: PendingBatch) -> tuple[PoolSnapshot, Tensor]:
        """A pool that holds the request's samples, and where in it; collective, in the order of
        requests.
        """
        return self.pool.fetch(request.indices, device=self.device)

    def _start(self, requests: Sequence[PendingBatch]) -> None:
        """Begins to make batches."""
        raise NotImplementedError

    def _finish(self, request: PendingBatch) -> tuple[Tensor, Tensor]:
        """The batch of the oldest request that was started."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Forgets all requests of the queue."""
