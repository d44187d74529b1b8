"""The memory that a computation holds, measured before it runs at full size."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpfast.hardware.out_of_memory import attempt

SETTLED = 0.02  # of a slope: so near are two that count as one
LARGEST = 64  # samples of a batch that is counted


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations create, while they live: ``live`` now, ``peak``
    at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._track(given, new=False)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self._track(made, new=True)
        return out

    def _track(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if new else 0
        if key in self._known:
            return

        def freed(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(call: Callable[[], object]) -> int:
    """Returns the most bytes that tensors made inside an eager ``call`` held at one moment, on any
    device.

    Counted by storage, so it is exact and repeatable; workspaces inside an operation are not seen.
    """
    with torch.no_grad(), LiveBytes() as counter:
        call()
    return counter.peak


def bytes_per_sample(call: Callable[[int], object], *, first: int = 1) -> tuple[int, int]:
    """Returns (fixed, per sample) bytes of ``call(batch)``, a line through its peaks at two
    batches.

    The peak of a batch is the largest of several moments, and those that do not grow with it, as
    when the gradients of all weights are there, hide the others in small batches. So batches double
    from ``first`` until the line goes on as it came (two slopes in a row differ by at most 2 %) and
    what grows is the larger part. Where memory runs out before, the last slope is taken.
    """
    size = first
    before = peak_bytes(lambda: call(first))
    slope = 0
    while size < LARGEST:
        peak, failure = attempt(lambda: peak_bytes(lambda: call(2 * size)))  # noqa: B023
        if peak is None:
            if not slope:
                assert failure is not None
                raise failure
            break
        last, slope = slope, max(1, (peak - before) // size)
        size, before = 2 * size, peak
        if abs(slope - last) <= SETTLED * slope and 2 * slope * size >= peak:
            break
    return max(0, before - size * slope), slope
