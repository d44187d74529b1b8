"""A device with less memory than a run would like, simulated on a CPU."""

import sys
from pathlib import Path

import torch

from dpfast.hardware.live_bytes import LiveBytes


class MemoryLimit(LiveBytes):
    """Within it, this thread's tensors have ``limit`` bytes: an operation that takes them beyond it
    runs out of memory.

        with MemoryLimit(1 << 20) as memory:
            ...
        memory.failures  # which functions were running when it ran out

    Storages that operations create count while they live, weights and what autograd saves among
    them; what was there before, what other threads make and workspaces inside an operation do not.
    The operation that fails has run: what it wrote in place stays written, unlike on a GPU.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.failures: list[list[str]] = []  # "file.function", the innermost first

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.live > self.limit:
            self.failures.append(_running())
            raise torch.OutOfMemoryError(
                f"out of memory: {self.live} bytes of {self.limit} after {func}"
            )
        return out

    def failed_in(self, function: str) -> int:
        """How often memory ran out while "file.function" was running."""
        return sum(function in running for running in self.failures)


def _running() -> list[str]:
    frame, names = sys._getframe(2), []
    while frame is not None:
        names.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return names
