"""The collectives of a process in their order, and which of two groups were in flight at once.

    recorder = CollectiveRecorder()
    recorder.record(ranks)
    ...
    recorder.order            equal on all ranks, group by group or as a whole
                              (``dpfast.parallel.groups``)
    recorder.overlaps("learn", "feed")

It serves tests and rehearsals; a run has none. What ``SyncBatchNorm`` sends on a GPU is not seen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from dpfast.parallel.groups import Group, Work
from dpfast.parallel.ranks import Ranks


@dataclass
class Collective:
    """A collective of this rank. group, kind, bytes: what was called with how much of this rank's
    data. began, ended: seconds; None: in flight.
    """

    group: str
    kind: str
    bytes: int
    began: float
    ended: float | None = None

    def meets(self, other: Collective) -> bool:
        """Returns True if both were in flight at one moment."""
        first, second = sorted((self, other), key=lambda collective: collective.began)
        return first.ended is None or second.began < first.ended


@dataclass(eq=False)
class CollectiveRecorder:
    """Writes down every collective of the groups that it records. delay: called before each, to
    provoke disorder.
    """

    delay: Any = None
    collectives: list[Collective] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, ranks: Ranks) -> None:
        """Puts itself between ``ranks`` and their groups: before a trainer takes them."""
        recorded = {
            id(group): self.group(group)
            for group in (ranks.learn, ranks.control, *ranks.feed.values())
        }
        ranks.learn, ranks.control = recorded[id(ranks.learn)], recorded[id(ranks.control)]
        ranks.feed = {kind: recorded[id(group)] for kind, group in ranks.feed.items()}

    def group(self, group: Group) -> Group:
        return _Recorded(group.name, group.handle, inner=group, recorder=self)

    @property
    def order(self) -> list[tuple[str, str, int]]:
        """The (group, kind, bytes) of all collectives, in the order of their beginning."""
        return [(each.group, each.kind, each.bytes) for each in self.collectives]

    def overlaps(self, *names: str) -> list[tuple[Collective, Collective]]:
        """Returns pairs of collectives of two of the groups ``names``, of any two by default, that
        were in flight together.
        """
        chosen = [each for each in self.collectives if not names or each.group in names]
        return [
            (one, other)
            for number, one in enumerate(chosen)
            for other in chosen[number + 1 :]
            if one.group != other.group and one.meets(other)
        ]

    def begun(self, group: str, kind: str, value: Tensor) -> Collective:
        if self.delay is not None:
            self.delay()
        with self._lock:
            found = Collective(
                group, kind, value.numel() * value.element_size(), time.perf_counter()
            )
            self.collectives.append(found)
        return found

    @contextmanager
    def during(self, group: str, kind: str, value: Tensor) -> Iterator[None]:
        found = self.begun(group, kind, value)
        yield
        found.ended = time.perf_counter()


@dataclass(frozen=True, eq=False)
class _Recorded(Group):
    """A group under the eyes of a recorder; what its collectives do is ``inner``'s, a simulation's
    perhaps.
    """

    inner: Group = field(kw_only=True)
    recorder: CollectiveRecorder = field(kw_only=True)

    def all_gather(self, value: Tensor) -> list[Tensor]:
        with self.recorder.during(self.name, "all_gather", value):
            return self.inner.all_gather(value)

    def all_reduce(self, value: Tensor, *, wait: bool = True) -> Work | None:
        return self._watched("all_reduce", value, wait, self.inner.all_reduce)

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        with self.recorder.during(self.name, "all_to_all", rows):
            return self.inner.all_to_all(rows, sent, received)

    def broadcast(self, value: Tensor, source: int, *, wait: bool = True) -> Work | None:
        return self._watched("broadcast", value, wait, partial(self.inner.broadcast, source=source))

    def send(self, value: Tensor, rank: int) -> None:
        with self.recorder.during(self.name, "send", value):
            self.inner.send(value, rank)

    def receive(self, value: Tensor, rank: int) -> None:
        with self.recorder.during(self.name, "receive", value):
            self.inner.receive(value, rank)

    def _watched(
        self, kind: str, value: Tensor, wait: bool, call: Callable[..., Work | None]
    ) -> Work | None:
        found = self.recorder.begun(self.name, kind, value)
        work = call(value, wait=wait)
        if not wait and work is not None:
            return _Watched(work, found)
        found.ended = time.perf_counter()
        return None


@dataclass(frozen=True)
class _Watched:
    """An operation in flight whose end is written down when somebody waits for it."""

    work: Work
    found: Collective

    def wait(self) -> Any:
        done = self.work.wait()
        self.found.ended = time.perf_counter()
        return done
