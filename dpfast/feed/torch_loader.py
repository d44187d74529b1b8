"""The loader in plain torch and native kernels: a thread prepares batches on a CPU, a side stream
on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dpfast.feed.buffers import BufferPool
from dpfast.feed.loader import PendingBatch, PoolLoader
from dpfast.hardware.device import is_gpu
from dpfast.pool.protocol import Pool

Batch = tuple[Tensor, Tensor]
BURST, BURST_BYTES = (
    16,
    64 << 20,
)  # batches that are made at once at most, and how large they are together


class TorchLoader(PoolLoader):
    """``PoolLoader`` on ``PoolSnapshot.gather``; every codec and device of the pool.

    On a GPU a side stream prepares batches, on a CPU a thread, except for what the caller makes
    faster on a CPU:

    - small batches of pixels, in bursts of BURST or BURST_BYTES: after a learner's step the caches
    hold nothing of
      a loader, and to find it again takes longer than to make the batch, but not longer than to
      make sixteen;
    - batches out of latents: a decoder in a thread of ours brings a second team of OpenMP threads,
    which spins for the
      cores of the learner's.

    On a CPU a batch of pixels lies in a slot that is used again when nobody holds the batch any
    more.

    threads: of the native kernels in the loader's thread; more than one bring that second team.
    ahead: batches that are prepared while the caller works, by the thread; None: as above, two
    where there is a thread.
    background: whether there is a thread; None: as above. On a GPU there is none: the caller's
    thread issues what goes over the ranks, in one order with the learner's collectives
    (``dpfast.parallel.groups``).
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
        super().__init__(pool, **options if ahead is None else options | {"ahead": ahead})
        self.threads = threads
        self._slots = BufferPool()
        if ahead is None and (count := self._count_on_demand()):
            self.ahead, self.on_demand = count, True
        if background is None:
            background = self.device.type == "cpu" and not self.on_demand
        self._worker = ThreadPoolExecutor(1, "dpfast-loader") if background else None
        self._stream = torch.cuda.Stream(self.device) if is_gpu(self.device) else None

    def close(self) -> None:
        super().close()
        if self._worker is not None:
            self._worker.shutdown()

    def _count_on_demand(self) -> int:
        """How many batches the caller makes at once; 0: none."""
        if not self.pool.ranks.alone or self.device.type != "cpu":
            return 0
        if not self.pool.local.view.in_place(self.device):
            return int(self.pool.codec == "latents")
        count = min(
            BURST_BYTES // (math.prod(self.batch_shape()) * self.form.dtype.itemsize), BURST
        )
        return count if count > 1 else 0

    def _start(self, requests: Sequence[PendingBatch]) -> None:
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                for request in requests:
                    batch = self._make(request)
                    request.work = batch, torch.cuda.current_stream().record_event()
        elif self._worker is not None:
            for request in requests:
                out = (
                    self._slots.batch(self.batch_shape(), self.form)
                    if self.pool.local.view.in_place(self.device)
                    else None
                )
                request.work = self._worker.submit(self._make, request, out)
        else:
            self._burst(requests)

    def _burst(self, requests: Sequence[PendingBatch]) -> None:
        """Makes all batches in one pass, into one slot, where they are pixels on the host."""
        view = self.pool.local.view
        if not self.pool.ranks.alone or not view.in_place(self.device):
            for request in requests:
                request.work = self._make(request)
            return
        count, channels, height, width = self.batch_shape()
        images, labels = view.gather(
            torch.cat([request.indices for request in requests]),
            self.form,
            flip=_joined([request.draw.flips for request in requests]),
            boxes=_joined([request.draw.boxes for request in requests]),
            size=self.augment.size,
            out=self._slots.batch((count * len(requests), channels, height, width), self.form),
        )
        for number, request in enumerate(requests):
            part = slice(number * count, (number + 1) * count)
            request.work = images[part], labels[part]

    def _finish(self, request: PendingBatch) -> Batch:
        if isinstance(request.work, Future):
            return request.work.result()
        if self._stream is None:
            return request.work
        batch: Batch
        batch, done = request.work
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(done)
        for tensor in batch:
            tensor.record_stream(stream)
        return batch

    def _drop(self) -> None:
        for request in self._queue:
            # the other ranks may have begun with it: what all were to do, all do
            cancelled = (
                self.pool.ranks.alone and isinstance(request.work, Future) and request.work.cancel()
            )
            if isinstance(request.work, Future) and not cancelled:
                request.work.exception()  # waits: the pool may go away after this

    @torch.no_grad()
    def _make(self, request: PendingBatch, out: Tensor | None = None) -> Batch:
        (view, places), draw = self._held(request), request.draw
        return view.gather(
            places,
            self.form,
            flip=draw.flips,
            boxes=draw.boxes,
            size=self.augment.size,
            device=self.device,
            out=out,
            threads=None if self._worker is None else self.threads,
        )


def _joined(rows: Sequence[Tensor | None]) -> Tensor | None:
    """The rows of all batches, None where they have none."""
    there = [part for part in rows if part is not None]
    return torch.cat(there) if there else None
