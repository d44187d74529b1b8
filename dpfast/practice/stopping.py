"""Decisions between two steps, the same on all ranks: SIGTERM or a checkpoint; and a loss that is
not finite.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from dpfast.parallel import ALONE, Ranks

# seconds of training between two questions among ranks: a request waits so long at most, or one
# step
ASK = 1.0
CHECKPOINT, STOP = 1, 2  # what a rank asks for; the highest counts


class Stopped(Exception):
    """A signal that the run was asked to stop and has saved its state."""


class LossError(RuntimeError):
    """An error for a loss that is not finite; the message names the iteration, the batch's sample
    ids and the last checkpoint.
    """


class Stop:
    """Turns SIGTERM into a request, while it is entered; of the main thread only."""

    def __init__(self) -> None:
        self.requested = False
        self._raise = False
        self._before: Any = None

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._raise:
            raise Stopped

    def check(self) -> None:
        """Raises ``Stopped`` when the stop was requested."""
        if self.requested:
            raise Stopped

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raises ``Stopped`` wherever a request arrives within a ``with`` block: for work that
        leaves nothing to save.
        """
        self.check()
        before, self._raise = self._raise, True
        try:
            yield
        finally:
            self._raise = before


class StopTogether:
    """Decides whether to stop before an optimiser step, or to make a checkpoint, alike on every
    rank.

    A rank cannot stop for itself: the others would wait for it in the next step. So ranks ask each
    other, not at every step, which would cost a GPU its queue, but ``ASK`` seconds apart. What they
    say at one question (what they ask for, and how long steps take) settles the step of the next
    one, so that all ask at the same step.
    """

    def __init__(self, stop: Stop, ranks: Ranks = ALONE) -> None:
        self.stop, self.ranks = stop, ranks
        self._next = 0  # the step before which ranks ask
        self._asked = (0, 0.0)  # the step of the last question, and when it was answered

    def anew(self) -> None:
        """Hears that training begins, or goes on after something else: ranks ask before its first
        step.
        """
        self._next = 0

    def before(self, step: int, *, checkpoint: Callable[[], bool] = lambda: False) -> int:
        """Returns the decision of all ranks before ``step``: ``STOP``, a ``CHECKPOINT`` that a rank
        asks for, or nothing (0).

        Raises ``RankError`` where a rank is dead that was to be asked.
        """
        ranks = self.ranks
        clock = self.ranks.heartbeat.clock
        if not ranks.alone:
            ranks.beat()
            if step < self._next:
                return 0
        asked = STOP if self.stop.requested else CHECKPOINT if checkpoint() else 0
        if ranks.alone:
            return asked
        before, since = self._asked
        steps = step - before
        said = ranks.all_gather_object([asked, clock.now() - since])
        asked = max(wish for wish, _ in said)
        if asked == STOP:
            self.stop.requested = True
            return STOP
        # from the first question on the steps between two are timed; they double at most, for a
        # step may be an outlier
        pace = ASK * steps / max(max(seconds for _, seconds in said), 1e-9)
        self._next = step + (1 if self._next == 0 else max(1, min(int(pace), 2 * steps)))
        self._asked = step, clock.now()
        return asked
