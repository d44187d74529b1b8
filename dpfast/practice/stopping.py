"""How a run ends before its time: SIGTERM, and a loss that is not finite."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class LossError(RuntimeError):
    """The loss is not finite; the message names the iteration, the batch's sample ids and the last checkpoint."""


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
        """Within it a request raises ``Stopped`` where it arrives: for work that leaves nothing to save."""
        self.check()
        before, self._raise = self._raise, True
        try:
            yield
        finally:
            self._raise = before
