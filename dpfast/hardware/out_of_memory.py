"""Running out of memory: how it is recognised, what is given back, and how work on rows goes on in
halves.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch

log = logging.getLogger(__name__)
Made = TypeVar("Made")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if an allocation failed, on a GPU or on a CPU (where torch raises a plain
    ``RuntimeError``).
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text
    )


def attempt(make: Callable[[], Made]) -> tuple[Made | None, BaseException | None]:
    """Returns what ``make`` gives, or the error where memory ran out; other errors are raised."""
    try:
        return make(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # the traceback would keep the batch's tensors alive
        return None, error.with_traceback(None)


def release(device: torch.device) -> None:
    """Gives back what a failed batch held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class HalvingBatches:
    """Work on rows, at most ``size`` of them at a time. Running out of memory halves ``size`` for
    good.

    device: whose memory it is. after_out_of_memory: called where memory ran out, to let go of what
    else could be made again.
    """

    def __init__(
        self,
        size: int,
        device: torch.device,
        *,
        after_out_of_memory: Callable[[], object] | None = None,
    ) -> None:
        self.size = size
        self.device = device
        self.after_out_of_memory = after_out_of_memory
        self.retries = 0

    def over(self, count: int, make: Callable[[slice], Made]) -> Iterator[Made]:
        """Yields ``make`` of the rows 0 to ``count``, part by part. Raises what a part of a single
        row raises.
        """
        done = 0
        while done < count:
            rows = slice(done, min(done + self.size, count))
            made, failure = attempt(partial(make, rows))
            if failure is not None:
                self._halve(rows.stop - rows.start, failure)
                continue
            done = rows.stop
            yield made  # type: ignore[misc]

    def _halve(self, rows: int, failure: BaseException) -> None:
        if rows == 1:
            raise failure
        self.size = rows // 2
        self.retries += 1
        if self.after_out_of_memory is not None:
            self.after_out_of_memory()
        release(self.device)
        log.warning("out of memory: going on with batches of %d", self.size)

    def since(self) -> int:
        """Returns how often memory ran out since this was last asked."""
        retries, self.retries = self.retries, 0
        return retries
