"""Checkpoints beside the training: when one is due, a copy of the state on the host, and the thread
that writes it.

What the loop waits for is the copy alone: on a GPU the host waits for nothing (copies into pinned
memory in the order of the stream, 1.4 GB of ViT-B's state; the next step begins on the device when
they are made), on a CPU for a memcpy. Checksum, writing and fsync go on in the thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpfast.hardware.device import is_gpu

POLL = 0.05  # seconds between two looks of the thread at what other ranks have saved


class CheckpointTimer:
    """Says when the next checkpoint is due: saving takes at most ``share`` of all seconds, none is
    older than ``minutes``.

    Saving counts from the copy to the end of fsync, though the loop only waits for the copy: the
    disk is shared by all that a run writes. The limit in minutes wins. clock: seconds that rise, of
    the rank that decides.
    """

    def __init__(
        self, share: float, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.share = share
        self.limit = 60 * minutes
        self.clock = clock
        self._begun = clock()
        self._took = 0.0

    def due(self) -> bool:
        """Returns True where a checkpoint may be made at an evaluation."""
        passed = self.clock() - self._begun
        return passed >= self.limit or passed * self.share >= self._took

    def overdue(self) -> bool:
        """Returns True where one must be made between two evaluations; never without a limit
        (``minutes`` = 0).
        """
        return 0 < self.limit <= self.clock() - self._begun

    def begun(self) -> None:
        """Notes that a checkpoint is being made."""
        self._begun = self.clock()
        self._took = float("inf")

    def took(self, seconds: float) -> None:
        """Notes that it is on the disk after so many seconds. One that failed is tried again when
        ``minutes`` have passed.
        """
        self._took = seconds


class HostCopy:
    """Tensors as they are at a moment, on the host, in memory that is kept from one time to the
    next.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns contiguous copies of ``tensors``. Those of a GPU are there after ``wait``, which
        the caller need not call.
        """
        memory: dict[str, Tensor] = {}
        gpu = None
        for name, value in tensors.items():
            held = self._memory.get(name)
            if held is None or (held.shape, held.dtype) != (value.shape, value.dtype):
                held = torch.empty(value.shape, dtype=value.dtype, pin_memory=is_gpu(value.device))
            memory[name] = held.copy_(value.detach(), non_blocking=True)
            gpu = value.device if is_gpu(value.device) else gpu
        self._memory, self._copied = memory, None
        if gpu is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(gpu))
        return memory

    def wait(self) -> None:
        """Returns when the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()


@dataclass
class WrittenCheckpoint:
    """The end of a checkpoint's writing. pending: whether it leads into a round; path: None where
    it was not written; seconds: from its copy on; waited: by the loop.
    """

    step: int
    pending: bool
    path: Path | None
    bytes: int
    waited: float
    seconds: float
    error: BaseException | None = None


class BackgroundWriter:
    """One thread, which writes one checkpoint at a time and ends with it.

    ready: asked again and again before the writing begins; until then a newer checkpoint may take
    the place.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self._waits = False  # for ``ready``
        self._lock = threading.Lock()
        self._done: deque[WrittenCheckpoint] = deque()

    @property
    def busy(self) -> bool:
        """True if a checkpoint is being written, or waits for its samples."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def writing(self) -> bool:
        """True if a checkpoint is being written."""
        return self.busy and not self._waits

    def clear(self, grace: float = 0.0) -> bool:
        """Makes room for the next one: waits for one that is being written, drops one that waits
        for its samples.

        grace: seconds that it may wait for them. True where one was dropped. Signals get through.
        """
        deadline = time.monotonic() + grace
        dropped = False
        while self.busy:
            with self._lock:
                if self._waits and time.monotonic() >= deadline:
                    self._cancelled.set()
                    dropped = True
            assert self._thread is not None
            self._thread.join(POLL)
        return dropped

    def wait(self) -> None:
        """Waits until what was begun has ended. Signals get through."""
        while self.busy:
            assert self._thread is not None
            self._thread.join(POLL)

    def begin(self, ready: Callable[[], bool], write: Callable[[], WrittenCheckpoint]) -> None:
        """Writes in the background as soon as ``ready``. After ``clear``."""
        self._cancelled.clear()
        self._waits = False
        self._thread = threading.Thread(
            target=self._run, args=(ready, write), name="dpfast-checkpoint", daemon=True
        )
        self._thread.start()

    def collect(self) -> list[WrittenCheckpoint]:
        """Returns what has ended since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def _run(self, ready: Callable[[], bool], write: Callable[[], WrittenCheckpoint]) -> None:
        while not ready():
            self._waits = True
            if self._cancelled.wait(POLL):
                return
        with self._lock:
            if self._cancelled.is_set():
                return
            self._waits = False
        self._done.append(write())
