"""The protocol of every loader, and the part that the loaders here share.

Batches are prepared ahead, and that is invisible: batch n is a function of (seed, position, pool at
the call of ``next``). When the pool has grown, what was prepared is dropped and drawn anew, so a
sample can be in the very next batch after its append; it costs the preparation of what was dropped.

Where several ranks hold the pool's samples, the order, the chances and the mixing are those of the
whole batch, and a loader delivers its rank's part of it (``dpfast.pool.sharded``). All ranks then
ask for the same batches.

The path of a batch, in reading order:

    PoolLoader.__next__         takes the oldest of the batches in preparation, and draws new ones
    Order, Augment              which samples, and what changes in them by chance
    Pool.fetch                  a snapshot of the pool that holds this process's part of them
    PoolSnapshot.gather         their images, normalised, cropped and mirrored, and their labels
    Work.result                 hands them over, wherever they were made: in a thread, on a side
                                stream, by the caller, in DALI's pipeline
    Augment.change, Mix.apply   RandAugment, the user's own, erasing; and mixing: by the caller,
                                whatever made the batch
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.feed.augment import Augment, AugmentationDraw
from dpfast.feed.order import Order
from dpfast.hardware.device import device_named
from dpfast.ops import check
from dpfast.ops.dispatch import CPU
from dpfast.pool.batch import BatchFormat
from dpfast.pool.protocol import Pool
from dpfast.pool.snapshot import Boxes, PoolSnapshot

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) and labels (B,) int64


class LoaderError(RuntimeError):
    """An error for a batch that could not be made; ``__cause__`` says why. The position stays where
    it was.
    """


class Loader(Protocol):
    """An endless iterator over the batches of a pool, with all that a loop asks of a loader.

    A batch is (images (B, C, H, W), labels (B,) int64), or (B, classes) float32 labels where
    samples are mixed. Both are on one device, and the caller may write to them.
    ``examples/own_loader.py`` is a loader of one's own.

    Attributes:
        pool: Pool that is drawn from; another one may be set before ``load_state_dict``.
        waited: Seconds that callers have spent in ``next``.
    """

    pool: Pool
    waited: float

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            InputError: For what a caller can mend.
            LoaderError: For a batch that could not be made.
        """
        ...

    def state_dict(self) -> dict[str, int]:
        """Returns the position after the last batch, a few integers."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position.

        Args:
            state: Position of this loader, or of another one with the same seed, batch size and
                pool.

        Raises:
            InputError: For what is no position.
        """
        ...

    def indices_after(self, state: dict[str, int], batches: int) -> Tensor:
        """Returns the indices from which a later batch was drawn, while the pool has not grown.

        Args:
            state: Position from which to count.
            batches: Number of batches behind it; the last of them is meant.

        Returns:
            (batch_size,) int64 indices into the pool.
        """
        ...

    def release(self) -> None:
        """Gives back the memory of prepared batches; they are made again on demand."""
        ...

    def close(self) -> None:
        """Drops what was prepared and ends the loader's threads."""
        ...


class Work(Protocol):
    """The making of one batch, under way or done."""

    def result(self) -> Batch:
        """Waits for the batch. Raises what its making has raised."""
        ...

    def drop(self) -> None:
        """Forgets the batch, and returns when its making does not read the pool any more. Raises
        nothing.
        """
        ...


@dataclass
class Made:
    """The work of a batch that is there already."""

    batch: Batch

    def result(self) -> Batch:
        return self.batch

    def drop(self) -> None:
        """Does nothing: nobody works."""


@dataclass
class PendingBatch:
    """One batch in preparation.

    Attributes:
        pool_size: samples in the pool that it is drawn from.
        indices: (batch_size,) int64 into the pool, of the whole batch.
        draw: the chances of the part that is delivered.
        after: the position behind it.
        work: its making, once that is started.
    """

    pool_size: int
    indices: Tensor
    draw: AugmentationDraw
    after: dict[str, int]
    work: Work | None = None


class PoolLoader(Loader):
    """The shared part of loaders: order, chances, preparation ahead, positions and mixing.

    A subclass starts the work.

    Args:
        pool: Samples to draw from; must hold one before the first batch.
        batch_size: Samples of a batch, of which a rank delivers an even part.
        seed: Key of the order and of all chances.
        augment: Changes of a batch by chance; None: nothing.
        form: Scale, dtype and memory layout of the batches; None: [-1, 1], float32, channels last.
        device: Device of the batches.
        classes: Number of classes; needed where ``augment`` mixes.
        fresh_weight: As in ``dpfast.feed.order.Order``.
        groups: Function that gives how many of the pool's first samples are a group of their own,
            and their share of every batch; None: there is none, now or at all.
        ahead: Batches that are prepared while the caller works.

    Raises:
        InputError: For a batch size, ``ahead`` or ``classes`` below 1, a seed or weight that
            ``Order`` refuses, a device that is not there, and mixing without ``classes``.
        TypeError: For an argument of another type.
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
        groups: Callable[[], tuple[int, float] | None] | None = None,
        ahead: int = 2,
    ) -> None:
        check.whole("ahead", ahead, "at least 1")
        if classes is not None:
            check.whole("classes", classes, "at least 1")
        self.augment = Augment() if augment is None else augment
        self.form = BatchFormat() if form is None else form
        self.device = device_named(device) if isinstance(device, str) else device
        for name, kind in (("augment", Augment), ("form", BatchFormat), ("device", torch.device)):
            if not isinstance(value := getattr(self, name), kind):
                raise TypeError(f"{name} = {value!r}: expected of type {kind.__name__}")
        if self.augment.mixes and classes is None:
            raise InputError("mixup and cutmix need classes, the number of classes")
        self.pool = pool
        self.seed = seed
        self.classes = classes
        repeats = self.augment.repeats
        self.order = Order(seed, batch_size, fresh_weight=fresh_weight, repeats=repeats)
        self.groups = groups
        self.count = (
            self.order.batch_size // pool.ranks.size
        )  # samples of a batch that are delivered
        self.waited = 0.0
        self.ahead = ahead
        self.on_demand = False  # whether batches are made when one is asked for, and not before
        self._number = 0  # of the next batch that is prepared
        self._queue: deque[PendingBatch] = deque()
        # behind the last batch that was delivered
        self._position = {"batches": 0, **self.order.state_dict()}
        self._shape: tuple[int, int, int] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        size = len(self.pool)
        if self._queue and self._queue[0].pool_size != size:
            self._rewind()
        if not self._queue:
            self._prepare(size)
        pending = self._queue[0]
        assert pending.work is not None
        with _Rewinding(self._rewind):
            images, labels = pending.work.result()
            images = self.augment.change(images, pending.draw, self.form)
            if pending.draw.mix is not None:
                assert self.classes is not None
                images, labels = pending.draw.mix.apply(images, labels, self.classes)
        self._queue.popleft()
        if not self.on_demand and len(self._queue) <= self.ahead // 2:
            self._prepare(size)
        self._position = pending.after
        self.waited += time.perf_counter() - started
        return images, labels

    def state_dict(self) -> dict[str, int]:
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name in self._position:
            if not isinstance(state, dict) or not isinstance(state.get(name), Integral):
                raise InputError(
                    f"state = {state!r}: expected the integers {', '.join(self._position)}"
                )
        self._shape = None
        self._position = dict(state)
        self._rewind()

    def indices_after(self, state: dict[str, int], batches: int) -> Tensor:
        order = copy.copy(self.order)
        order.load_state_dict(state)
        for _ in range(batches):  # one at a time: all of them may be millions
            indices = order.next(len(self.pool), **self._drawn(len(self.pool)))
        return indices

    def close(self) -> None:
        self._rewind()

    def release(self) -> None:
        self._rewind()

    def image_shape(self) -> tuple[int, int, int]:
        """Returns (C, H, W) of the pool's images, before any crop."""
        if self._shape is None:
            shape = self.pool.shape if self.pool.codec == "pixels" else None
            if shape is None:
                if not len(self.pool):
                    raise InputError("the pool is empty: expected a sample before the first batch")
                shape = self.pool.images(torch.zeros(1, dtype=torch.int64)).shape[1:]
            channels, height, width = shape
            self._shape = channels, height, width
        return self._shape

    def batch_shape(self) -> tuple[int, int, int, int]:
        """Returns (B, C, H, W) of what is delivered."""
        channels, *size = self.image_shape()
        height, width = self.augment.size or size
        return self.count, channels, height, width

    def boxes(self, snapshot: PoolSnapshot, draw: AugmentationDraw) -> Boxes | None:
        """Returns what ``PoolSnapshot.gather`` shows of the samples of a batch."""
        if snapshot.codec != "jpeg":
            return draw.boxes
        return lambda sizes: self.boxes_in(sizes, snapshot, draw)

    def boxes_in(
        self, sizes: Tensor, snapshot: PoolSnapshot, draw: AugmentationDraw
    ) -> Tensor | None:
        """Returns the boxes in JPEG pictures of these (B, 2) heights and widths; None: all of each.

        Raises ``InputError`` for pictures of several sizes where ``augment`` gives the batch none,
        and where the pool was grey at the first batch and is not any more.
        """
        channels, *first = self.image_shape()
        if snapshot.coloured and channels == 1:
            raise InputError(
                "the pool's pictures were grey at this loader's first batch, and now some have "
                "colours: make a new loader"
            )
        others = sizes[(sizes != torch.tensor(first)).any(1)]
        if self.augment.size is None and len(others):
            found = " and ".join(f"{h} x {w}" for h, w in (first, others[0].tolist()))
            raise InputError(
                f"the pool holds pictures of {found} pixels: several sizes need "
                "Augment(size=(height, width)), the size of a batch"
            )
        return draw.boxes_in(sizes) if self.resamples() else None

    def resamples(self) -> bool:
        """Returns True if batches need boxes; of JPEG pictures, which may have any size, wherever
        ``augment`` gives the batch a size.
        """
        image = None if self.pool.codec == "jpeg" else self.image_shape()[1:]
        return self.augment.resamples(image)

    def _drawn(self, size: int) -> dict[str, Any]:
        """Returns how the order chooses among ``size`` samples: the last ``fresh`` of them, and
        their share where it is said.
        """
        group = None if self.groups is None else self.groups()
        if group is not None:
            first, share = group
            return {"fresh": size - first, "share": 1 - share}
        return {"fresh": self.pool.fresh if self.order.fresh_weight != 1 else 0}

    def _prepare(self, size: int) -> None:
        """Draws batches until the queue is full, and starts their work."""
        count = self.ahead - len(self._queue)
        if count < 1:
            return
        with _Rewinding(self._rewind):
            drawn = self._draw(size, count)
            self._queue.extend(drawn)
            self.start(drawn)

    def _draw(self, size: int, count: int) -> list[PendingBatch]:
        """Returns the next ``count`` batches out of ``size`` samples."""
        image = self.image_shape()[1:]
        indices = self.order.next(size, batches=count, **self._drawn(size))
        ranks = self.pool.ranks
        alone = ranks.alone
        drawn = []
        for number, part in enumerate(indices.split(self.order.batch_size), 1):
            draw = self.augment.draw(len(part), image, seed=self.seed, number=self._number)
            if not alone:
                draw = draw.part(ranks.part(len(part)))
            self._number += 1
            after = {"batches": self._number, **self.order.state_dict(before=count - number)}
            drawn.append(PendingBatch(size, part, draw, after))
        return drawn

    def _rewind(self) -> int:
        """Takes everything back that was prepared and not delivered; the batches before that."""
        for pending in self._queue:
            if pending.work is not None:
                pending.work.drop()
        self._queue.clear()
        self._number = self._position["batches"]
        self.order.load_state_dict(self._position)
        return self._number

    def start(self, drawn: Sequence[PendingBatch]) -> None:
        """Gives each of ``drawn`` its ``work``, in this order: what ``Pool.fetch`` exchanges
        between ranks is collective.
        """
        raise NotImplementedError


class _Rewinding:
    """Takes back what was prepared where its making fails: an ``InputError`` goes to the caller as
    it is, anything else as the cause of a ``LoaderError``.

    A class, because ``contextlib`` takes an error whose cause is ``StopIteration`` for its own and
    raises that cause, which ends the caller's loop as if there were no more batches.
    """

    def __init__(self, rewind: Callable[[], int]) -> None:
        self.rewind = rewind

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        batches = self.rewind()
        if not isinstance(error, InputError):
            raise LoaderError(
                f"a batch after the first {batches} could not be made: {error!r}"
            ) from error
