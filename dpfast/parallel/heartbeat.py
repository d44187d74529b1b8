"""Waiting for other ranks. A rank counts as dead when it has made no progress for ``--timeout``
seconds.

A rank counts what it completes (batches made, optimiser steps, batches evaluated, images read) and
tells the others through torchrun's store. No thread does that for it: a rank whose main thread
hangs makes no progress. Who waits for a rank looks at that count, and waits as long as it rises. So
a GPU may be as slow as it likes: a round of hours has no collective before its end, and two GPUs
are never equally fast. To wait counts as progress as well, for who waits watches whom it waits for.

Ranks wait here first and call a collective of gloo or NCCL then, when all are ready. What is left
to a collective's own timeout is less than one step of the learner, in which a slow rank and a dead
one look alike. gloo raises then. On GPUs nothing would: the host waits in CUDA, where no exception
arrives, until NCCL's watchdog ends the process without a name. There a thread (``Presence``)
watches the others' threads: a process that was stopped or whose node is gone is named. One whose
main thread alone hangs is not, but ends by NCCL's watchdog.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from dpfast.errors import first_line

TIMEOUT = 600.0  # seconds without progress; the longest that makes none is a compiled first batch
# seconds between two looks at what others have said, at first and after a while
POLLS = (
    0.001,
    0.05,
)
AHEAD = (
    60.0  # seconds by which NCCL's watchdog waits longer than who can name the rank that is lost
)
# seconds between two messages of a rank that makes progress, at most a tenth of the timeout
TELLS = 5.0


class RankError(RuntimeError):
    """An error for a rank that does not answer; the message names it."""


class Clock:
    """The time that ranks wait by. A simulation gives its own, together with the store."""

    def now(self) -> float:
        """Returns seconds from some moment on."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(eq=False)
class Heartbeat:
    """This process's progress, and the others' as far as it waits for them.

    store: of torch.distributed, or what has its ``set``, ``get`` and ``check`` (``Ranks.store``:
    ``multi_get`` and ``delete_key`` as well); None: a process alone. process, processes: its number
    among all of the run, and how many they are. timeout: seconds.
    """

    store: Any = None
    process: int = 0
    processes: int = 1
    timeout: float = TIMEOUT
    clock: Clock = field(default_factory=Clock)
    count: int = field(default=0, init=False)
    _told: float | None = field(default=None, init=False)

    @property
    def interval(self) -> float:
        """The seconds between two messages, and between two looks at another's."""
        return min(self.timeout / 10, TELLS)

    def beat(self) -> None:
        """Counts one more completed piece of work. Costs an addition, and a message through the
        store now and then.
        """
        if self.store is None:
            return
        self.count += 1
        now = self.clock.now()
        if self._told is None or now - self._told >= self.interval:
            self._told = now
            self.store.set(f"beat/{self.process}", str(self.count))

    def wait(self, done: Callable[[], bool], late: Callable[[], Collection[int]]) -> None:
        """Waits until ``done``, as long as the processes ``late`` make progress.

        Raises ``RankError`` that names those that make none, or says why one has ended. Signals get
        through: it does not wait inside the store.
        """
        watch = Watch(self)
        pause = POLLS[0]
        looked = self.clock.now()
        while not done():
            self.beat()
            if self.clock.now() - looked >= self.interval:
                looked, missing = self.clock.now(), late()
                for words in filter(None, map(self.left, missing)):
                    raise RankError(words)
                watch.look(missing)
            self.clock.sleep(pause)
            pause = min(1.2 * pause, POLLS[1])

    def leave(self, error: BaseException | None) -> None:
        """Tells the others that this process ends, with its ``error`` if it ends before its
        time.
        """
        words = f"rank {self.process} of {self.processes} has ended"
        if isinstance(error, RankError):
            words = str(error)
        elif error is not None:
            words += f": {type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self.store.set(f"left/{self.process}", words)

    def left(self, process: int) -> str:
        """Returns the last words of a process that ended; empty while it has not."""
        key = f"left/{process}"
        return self.store.get(key).decode() if self.store.check([key]) else ""


class Watch:
    """A watch over other processes: how long each has said the same, from the first look on.

    key: under which they say it in the store.
    """

    def __init__(self, heartbeat: Heartbeat, key: str = "beat") -> None:
        self.heartbeat, self.key = heartbeat, key
        self._began = heartbeat.clock.now()
        self._seen: dict[
            int, tuple[bytes, float]
        ] = {}  # the count that was read last, and when it was new

    def look(self, processes: Collection[int], *, longer: float = 0.0) -> None:
        """Raises ``RankError`` that names those of ``processes`` without news for the timeout and
        ``longer``.
        """
        heart, dead = self.heartbeat, []
        for process in processes:
            key, now = f"{self.key}/{process}", heart.clock.now()
            count = heart.store.get(key) if heart.store.check([key]) else b""
            before, since = self._seen.get(process, (count, self._began))
            self._seen[process] = (count, since if count == before else now)
            if now - self._seen[process][1] >= heart.timeout + longer:
                dead.append(process)
        if dead:
            raise RankError(silent(dead, heart.processes, heart.timeout))


class Presence:
    """A thread that says that this process is there, and ends it when another one has not been for
    too long.

    It is for GPUs, where the main thread may wait for a lost rank in CUDA. Half of ``AHEAD`` after
    the
    timeout: whoever can raise has done so, and NCCL's watchdog has not spoken yet. leave: what ends
    the process, after the words.
    """

    def __init__(self, heartbeat: Heartbeat, leave: Callable[[int], object] = os._exit) -> None:
        self.heartbeat, self.leave = heartbeat, leave
        self._others = [
            process for process in range(heartbeat.processes) if process != heartbeat.process
        ]
        self._watch = Watch(heartbeat, "here")
        self._count = 0
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="dpfast-presence", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def look(self) -> None:
        """Says it once more, and looks for the others."""
        self._count += 1
        self.heartbeat.store.set(f"here/{self.heartbeat.process}", str(self._count))
        try:
            self._watch.look(
                [p for p in self._others if not self.heartbeat.left(p)], longer=AHEAD / 2
            )
        except RankError as error:
            print(f"dpfast: error: {error}", file=sys.stderr, flush=True)
            self.leave(1)

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone, and torchrun with it
            while not self._ended.wait(self.heartbeat.interval):
                self.look()


def silent(dead: Collection[int], processes: int, timeout: float) -> str:
    """Returns the sentence that names processes which do not answer; empty where there are none."""
    if not dead:
        return ""
    named = ", ".join(map(str, sorted(dead)))
    return (
        f"rank{'s' if len(dead) > 1 else ''} {named} of {processes} did not answer: dead, or "
        "without progress for "
        f"{timeout:g} s (--timeout)"
    )
