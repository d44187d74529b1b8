"""``learner.compile = "auto"``: does compiling the learner's step pay within the steps that are
left?
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

log = logging.getLogger(__name__)
# an eager step is timed between these two; the first ones choose their kernels
FROM, UNTIL = (
    10,
    60,
)
# of compiling, and by compiling; assumed, as for the generator: no learner was timed
SECONDS, SPEEDUP = (
    300.0,
    1.1,
)


class Event(Protocol):
    """A place in a GPU's queue."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end: Any) -> float: ...


class WhenItPays:
    """A question asked before each step, which says once whether to compile from now on. It waits
    for nothing: it times by events.
    """

    def __init__(self, event: Callable[[], Event] | None = None) -> None:
        self.event = event or partial(torch.cuda.Event, enable_timing=True)
        self._asked = 0
        self._begin: Event | None = None
        self._end: Event | None = None

    def __call__(self, left: int) -> bool:
        """Returns True if compiling now pays, with ``left`` steps to go."""
        self._asked += 1
        if self._asked == FROM:
            self._begin = self.event()
            self._begin.record()
        elif self._asked == UNTIL:
            self._end = self.event()
            self._end.record()
        if self._begin is None or self._end is None or not self._end.query():
            return False
        step = self._begin.elapsed_time(self._end) / 1e3 / (UNTIL - FROM)
        self._end, saved = None, left * step * (1 - 1 / SPEEDUP)
        log.info(
            "compiling the learner saves %.0f s of %d steps at %.1f ms", saved, left, step * 1e3
        )
        return saved > SECONDS
