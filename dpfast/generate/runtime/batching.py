"""How many samples go into a batch: found on the job, by doubling.

The batches that measure are batches of the stream: nothing is sampled twice or thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")
FIRST = 8
LARGEST = 1024
GAIN = 1.05  # a doubling that brings less than this is not worth its memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU (where torch raises a plain ``RuntimeError``)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)


def attempt(make: Callable[[], Made]) -> tuple[Made | None, BaseException | None]:
    """What ``make`` gives, or the error where memory ran out; other errors are raised."""
    try:
        return make(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, error.with_traceback(None)  # the traceback would keep the batch's tensors alive


class BatchSizer:
    """Doubles the batch while samples per second grow, then keeps the best size. Out of memory halves it for good.

        while samples remain:
            make `sizer.size` of them, then `sizer.report(seconds)` or `sizer.out_of_memory(error)`

    Two doublings in a row must fail to gain before the search ends: one slow batch says little on a busy machine.
    """

    def __init__(self, first: int, *, limit: int, search: bool = True) -> None:
        self.size = max(1, min(first, limit))
        self.limit = limit
        self.searching = search
        self._rates: dict[int, float] = {}
        self._without_gain = 0

    def report(self, seconds: float) -> None:
        """A whole batch of ``size`` took so long."""
        if not self.searching:
            return
        rate = self.size / max(seconds, 1e-9)
        gained = rate > GAIN * max(self._rates.values(), default=0.0)
        self._rates[self.size] = rate
        self._without_gain = 0 if gained else self._without_gain + 1
        if self._without_gain == 2 or 2 * self.size > self.limit:
            self._settle()
        else:
            self.size *= 2

    def out_of_memory(self, error: BaseException) -> None:
        """A batch of ``size`` did not fit. Raises ``error`` when it held a single sample."""
        if self.size == 1:
            raise error
        self.limit = self.size = self.size // 2
        if self.searching:
            self._settle()

    def _settle(self) -> None:
        self.searching = False
        best = max(self._rates.values(), default=0.0)
        fit = [size for size, rate in self._rates.items() if rate * GAIN >= best and size <= self.limit]
        self.size = min(fit, default=min(self.size, self.limit))
