"""What a computation holds in memory, measured before it runs at full size."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dpfast.hardware.memory import free_bytes, local_ranks


class _Peak(TorchDispatchMode):
    """Counts the bytes of storages that operations create, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, lambda tensor: self._track(tensor, new=False), (args, kwargs))
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda tensor: self._track(tensor, new=True), out)
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
    """The most bytes that tensors made inside an eager ``call`` held at one moment, on any device.

    Counted by storage, so it is exact and repeatable; workspaces inside an operation are not seen.
    """
    with torch.no_grad(), _Peak() as counter:
        call()
    return counter.peak


def bytes_per_sample(call: Callable[[int], object]) -> tuple[int, int]:
    """(fixed, per sample) bytes of ``call(batch)``, from runs of two and four samples."""
    two, four = peak_bytes(lambda: call(2)), peak_bytes(lambda: call(4))
    each = max(1, (four - two) // 2)
    return max(0, two - 2 * each), each


def available_bytes(device: torch.device) -> int:
    """Free memory of a GPU; of a CPU this rank's part of what is free to the job (``dpfast.hardware.memory``)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes() // local_ranks()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of a GPU what torch allocated, on a CPU resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
