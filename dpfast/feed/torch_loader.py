"""The loader in plain torch and native kernels: a thread prepares batches on a CPU, a side stream
on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpfast.feed.buffers import BufferPool
from dpfast.feed.loader import Batch, Made, PendingBatch, PoolLoader
from dpfast.hardware.device import is_gpu
from dpfast.ops import check
from dpfast.pool.protocol import Pool

BURST = 16  # batches that are made at once at most
BURST_BYTES = 64 << 20  # how large they are together at most


class TorchLoader(PoolLoader):
    """``PoolLoader`` on ``PoolSnapshot.gather``; every codec and device of the pool.

    On a GPU a side stream prepares batches, on a CPU a thread, except for what the caller makes
    faster on a CPU:

    - Small batches of pixels, in bursts of BURST or BURST_BYTES. After a learner's step the caches
      hold nothing of a loader, and to find it again takes longer than to make the batch, but not
      longer than to make sixteen.
    - Batches out of latents. A decoder in a thread of ours brings a second team of OpenMP threads,
      which spins for the cores of the learner's.

    On a CPU a batch of pixels lies in a buffer that is used again when nobody holds the batch any
    more.

    Args:
        threads: of the native kernels in the loader's thread; more than one bring that second team.
        ahead: batches that are prepared while the caller works, by the thread; None: as above, two
            where there is a thread.
        background: whether there is a thread; None: as above. On a GPU there is none: the caller's
            thread issues what goes over the ranks, in one order with the learner's collectives
            (``dpfast.parallel.groups``).
        options: of ``PoolLoader``.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        threads: int = 1,
        ahead: int | None = None,
        background: bool | None = None,
        **options: Any,
    ) -> None:
        check.whole("threads", threads, "at least 1")
        if not (background is None or isinstance(background, bool)):
            raise TypeError(f"background must be None, True or False, got {background!r}")
        super().__init__(pool, **options if ahead is None else options | {"ahead": ahead})
        self.threads = threads
        self._buffers = BufferPool()
        if ahead is None and (count := self._count_on_demand()):
            self.ahead = count
            self.on_demand = True
        if background is None:
            background = self.device.type == "cpu" and not self.on_demand
        self._worker = ThreadPoolExecutor(1, "dpfast-loader") if background else None
        self._stream = torch.cuda.Stream(self.device) if is_gpu(self.device) else None

    def close(self) -> None:
        super().close()
        if self._worker is not None:
            self._worker.shutdown()

    def _count_on_demand(self) -> int:
        """Counts the batches that the caller makes at once; 0: none."""
        if not self.pool.ranks.alone or self.device.type != "cpu":
            return 0
        if not self.pool.local.snapshot.in_place(self.device):
            return int(self.pool.codec == "latents")
        batch = math.prod(self.batch_shape()) * self.form.dtype.itemsize
        count = min(BURST_BYTES // batch, BURST)
        return count if count > 1 else 0

    def start(self, drawn: Sequence[PendingBatch]) -> None:
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                for pending in drawn:
                    batch = self._make(pending)
                    done = torch.cuda.current_stream().record_event()
                    pending.work = _OnStream(batch, done, self.device)
        elif self._worker is not None:
            for pending in drawn:
                out = self._buffer(1)
                future = self._worker.submit(self._make, pending, out)
                pending.work = _InThread(future, cancels=self.pool.ranks.alone)
        elif self.pool.ranks.alone and (out := self._buffer(len(drawn))) is not None:
            self._burst(drawn, out)
        else:
            for pending in drawn:
                pending.work = Made(self._make(pending))

    def _burst(self, drawn: Sequence[PendingBatch], out: Tensor) -> None:
        """Makes all batches in one pass, into ``out``."""
        snapshot, indices = self.pool.fetch(torch.cat([pending.indices for pending in drawn]))
        images, labels = snapshot.gather(
            indices,
            self.form,
            flip=_joined([pending.draw.flips for pending in drawn]),
            boxes=_joined([pending.draw.boxes for pending in drawn]),
            size=self.augment.size,
            out=out,
        )
        each = zip(images.split(self.count), labels.split(self.count), strict=True)
        for pending, batch in zip(drawn, each, strict=True):
            pending.work = Made(batch)

    def _buffer(self, batches: int) -> Tensor | None:
        """Returns memory for so many batches together; None where ``gather`` makes its own."""
        if not self.pool.local.snapshot.in_place(self.device):
            return None
        count, channels, height, width = self.batch_shape()
        return self._buffers.batch((batches * count, channels, height, width), self.form)

    @torch.no_grad()
    def _make(self, pending: PendingBatch, out: Tensor | None = None) -> Batch:
        snapshot, indices = self.pool.fetch(pending.indices, device=self.device)
        return snapshot.gather(
            indices,
            self.form,
            flip=pending.draw.flips,
            boxes=self.boxes(snapshot, pending.draw),
            size=self.augment.size,
            device=self.device,
            out=out,
            threads=None if self._worker is None else self.threads,
        )


@dataclass(frozen=True)
class _InThread:
    """``Work`` of the loader's thread. cancels: whether what has not begun may be left out; where
    other ranks take part they may have begun with it, and what all were to do, all do.
    """

    future: Future[Batch]
    cancels: bool

    def result(self) -> Batch:
        return self.future.result()

    def drop(self) -> None:
        if not (self.cancels and self.future.cancel()):
            self.future.exception()  # waits: the pool may go away after this


@dataclass(frozen=True)
class _OnStream:
    """``Work`` of a side stream of ``device``, complete when ``done`` is."""

    batch: Batch
    done: torch.cuda.Event
    device: torch.device

    def result(self) -> Batch:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        for tensor in self.batch:
            tensor.record_stream(stream)
        return self.batch

    def drop(self) -> None:
        """Does nothing: streams end what they have begun, in their order."""


def _joined(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Returns the rows of all batches, None where they have none."""
    there = [part for part in rows if part is not None]
    return torch.cat(there) if there else None
