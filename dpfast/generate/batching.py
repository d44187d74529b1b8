"""The size of a batch of samples: as many as memory holds, and found on the job by doubling.

The batches that measure are batches of the stream: nothing is sampled twice or thrown away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from dpfast.generate.step import Variant
from dpfast.hardware.live_bytes import bytes_per_sample
from dpfast.hardware.memory import available_bytes

log = logging.getLogger(__name__)
FIRST = 8
LARGEST = 1024
GAIN = 1.05  # a doubling that brings less than this is not worth its memory
SHARE = 0.5  # of the available memory that a batch may take


def dearest(variants: Iterable[Variant]) -> Variant:
    """Returns the variant that takes the most memory; a step that reuses features never does."""
    whole = (variant for variant in variants if variant.features != "reuse")
    return max(whole, key=lambda variant: (variant.guided, variant.cfg))


def largest_batch(probe: Callable[[int], object], device: torch.device) -> int:
    """Returns the most samples that take half of the memory that is available, by the bytes that
    ``probe`` holds, which runs on the number of samples it is given.
    """
    fixed, each = bytes_per_sample(probe)
    largest = int((available_bytes(device) * SHARE - fixed) // each)
    log.info(
        "a sample takes %.1f MB in its dearest step: at most %d in a batch", each / 1e6, largest
    )
    return max(1, largest)


class BatchSizer:
    """Doubles the batch while samples per second grow, then keeps the best size. Out of memory
    halves it for good.

        while samples remain:
            make `sizer.size` of them, then `sizer.report(seconds)` or `sizer.out_of_memory(error)`

    Two doublings in a row must fail to gain before the search ends: one slow batch says little on a
    busy machine.
    """

    def __init__(self, first: int, *, limit: int, search: bool = True) -> None:
        self.size = max(1, min(first, limit))
        self.limit = limit
        self.searching = search
        self._rates: dict[int, float] = {}
        self._without_gain = 0

    def report(self, seconds: float) -> None:
        """Notes how long a whole batch of ``size`` took."""
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
        """Notes that a batch of ``size`` did not fit. Raises ``error`` when it held a single
        sample.
        """
        if self.size == 1:
            raise error
        self.limit = self.size = self.size // 2
        if self.searching:
            self._settle()

    def _settle(self) -> None:
        self.searching = False
        best = max(self._rates.values(), default=0.0)
        fit = [
            size for size, rate in self._rates.items() if rate * GAIN >= best and size <= self.limit
        ]
        self.size = min(fit, default=min(self.size, self.limit))
