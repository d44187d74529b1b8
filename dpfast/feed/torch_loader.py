"""The loader in plain torch and native kernels: a thread prepares batches on a CPU, a side stream on a GPU."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from dpfast.feed.loader import PoolLoader, Request
from dpfast.feed.slots import Slots
from dpfast.pool.pool import SamplePool
from dpfast.pool.union import UnionPool

Batch = tuple[Tensor, Tensor]


class TorchLoader(PoolLoader):
    """``PoolLoader`` on ``View.gather``; every codec and device of the pool.

    On a CPU a batch lies in a slot that is used again when nobody holds the batch any more.

    threads: of the native kernels on a CPU. More than one makes batches faster and the learner beside them slower: a
        second team of OpenMP threads spins for the cores of the first (the embedded recipe's step took twice as long).
    """

    def __init__(self, pool: SamplePool | UnionPool, *, threads: int = 1, **options: Any) -> None:
        super().__init__(pool, **options)
        self.threads = threads
        self._slots = Slots()
        self._worker = ThreadPoolExecutor(1, "dpfast-loader") if self.device.type == "cpu" else None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def close(self) -> None:
        super().close()
        if self._worker is not None:
            self._worker.shutdown()

    def _start(self, request: Request) -> None:
        if self._worker is not None:
            self.image_shape()  # here, so that the thread finds it
            pool, draw = self.pool, request.draw
            view = pool.local.view if isinstance(pool, UnionPool) else pool.view
            out = self._slots.batch(self.batch_shape(), self.form) if view.in_place(self.device) else None
            if isinstance(pool, UnionPool) or out is None:
                request.work = self._worker.submit(self._make, request, out)
                return
            options = {"flip": draw.flips, "boxes": draw.boxes, "size": self.augment.size, "threads": self.threads}
            request.work = self._worker.submit(view.deferred(request.indices, self.form, out=out, **options))
            return
        with torch.cuda.stream(self._stream):
            batch = self._make(request)
            request.work = batch, torch.cuda.current_stream().record_event()

    def _finish(self, request: Request) -> Batch:
        if isinstance(request.work, Future):
            return request.work.result()
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
            cancelled = isinstance(self.pool, SamplePool) and isinstance(request.work, Future) and request.work.cancel()
            if isinstance(request.work, Future) and not cancelled:
                request.work.exception()  # waits: the pool may go away after this

    @torch.no_grad()
    def _make(self, request: Request, out: Tensor | None = None) -> Batch:
        (view, places), draw = self._held(request), request.draw
        return view.gather(
            places,
            self.form,
            flip=draw.flips,
            boxes=draw.boxes,
            size=self.augment.size,
            device=self.device,
            out=out,
            threads=None if out is None else self.threads,
        )
