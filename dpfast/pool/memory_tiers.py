"""The places of the pool's chunks: device memory, then host memory, then files, each up to its
budget.

On a machine with CUDA, host memory is pinned, so that a GPU reads it in place. A file is unlinked
as soon as it is mapped: nothing is left behind however the process ends. Its blocks are reserved at
once, so that a full disk is an ``OSError`` here and not a signal later.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpfast import config
from dpfast.errors import InputError, RecipeError
from dpfast.hardware.device import device_of
from dpfast.hardware.memory import free_bytes

NAMES = ("device", "host", "file")
HOST_SHARE = 0.7  # of the memory that is free; the learner and its batches need some
DEVICE_SHARE = 0.5
FILE_SHARE = 0.9
GIB = 1 << 30


class PoolFullError(MemoryError):
    """An error for a pool whose tiers have no room for another chunk."""


@dataclass(frozen=True, kw_only=True)
class MemoryTiers:
    """The budgets in bytes of the places of a pool's chunks, used in this order.

    Args:
        device: Device of ``device_bytes``.
        device_bytes: Budget of device memory; needs ``device``.
        host_bytes: Budget of host memory.
        folder: Folder of mapped files.
        file_bytes: Budget of mapped files; needs ``folder``.

    Raises:
        InputError: For a budget below 0, and one without its device or folder.
    """

    device: torch.device | None = None
    device_bytes: int = 0
    host_bytes: int = 0
    folder: Path | None = None
    file_bytes: int = 0

    def __post_init__(self) -> None:
        for name in NAMES:
            if self.budget(name) < 0:
                raise InputError(f"{name}_bytes = {self.budget(name)}, expected at least 0")
        if self.device_bytes and self.device is None:
            raise InputError(f"device_bytes = {self.device_bytes} without a device")
        if self.file_bytes and self.folder is None:
            raise InputError(f"file_bytes = {self.file_bytes} without a folder")

    @classmethod
    def detect(
        cls,
        device: torch.device | str | None = None,
        folder: Path | None = None,
        *,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        free: float | None = None,
        processes: int = 1,
    ) -> MemoryTiers:
        """Returns shares of what is free now: device memory for a CUDA device, host memory within
        the limits of a container or of Slurm (``dpfast.hardware.memory``), and the disk of
        ``folder``.

        device_bytes, host_bytes: budgets in place of the shares; of a CPU as the device, a budget
        in bytes is a part of the host's memory that is filled first. free: bytes of one process's
        host memory in place of what is found.
        processes: that share this machine's host memory and disk alike.
        """
        # with a budget the device may be one that is planned for, and is not there
        if device is not None and (device_bytes is None or isinstance(device, str)):
            device = device_of(device)
        cuda = device is not None and device.type == "cuda"
        if device_bytes is None:
            device_bytes = int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE) if cuda else 0
        if host_bytes is None:
            share = HOST_SHARE * (free_bytes() / processes if free is None else free)
            host_bytes = max(0, int(share) - (0 if cuda else device_bytes))
        return cls(
            device=device if device_bytes else None,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            folder=folder,
            file_bytes=0
            if folder is None
            else int(shutil.disk_usage(folder).free * FILE_SHARE / processes),
        )

    @classmethod
    def from_recipe(
        cls, recipe: config.Pool, device: torch.device, folder: Path | None, *, processes: int = 1
    ) -> MemoryTiers:
        """Returns the budgets of a recipe's section ``[pool]``. Raises ``RecipeError`` for files
        without a folder.
        """
        device_bytes, host_bytes = (
            None if size is None else int(size * GIB)
            for size in (recipe.device_gib, recipe.host_gib)
        )
        if recipe.mapped and folder is None:
            raise RecipeError("mapped = true: there is no folder for the files; run with one")
        mapped = folder if recipe.mapped else None
        return cls.detect(
            device, mapped, device_bytes=device_bytes, host_bytes=host_bytes, processes=processes
        )

    def budget(self, name: str) -> int:
        """Returns bytes of the tier, one of ``NAMES``."""
        return int(getattr(self, f"{name}_bytes"))

    def next_tier(self, used: Mapping[str, int], chunk_bytes: int) -> str:
        """Returns the tier of one more chunk beside so many in each; raises ``PoolFullError``."""
        for name in NAMES:
            if (used.get(name, 0) + 1) * chunk_bytes <= self.budget(name):
                return name
        budgets = ", ".join(f"{name} {readable(self.budget(name))}" for name in NAMES)
        raise PoolFullError(
            f"the pool holds {sum(used.values())} chunks of {readable(chunk_bytes)} "
            f"and its budgets are full ({budgets}): raise host_gib, "
            "map files (mapped = true), or store latents or JPEG (codec)"
        )

    def allocate(self, name: str, chunk_bytes: int) -> Tensor:
        """Returns (chunk_bytes,) uint8 of the tier, its contents undefined. Raises ``OSError``
        where the disk is full.
        """
        if name == "device":
            return torch.empty(chunk_bytes, dtype=torch.uint8, device=self.device)
        if name == "file":
            assert self.folder is not None
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, chunk_bytes)
                return torch.frombuffer(mmap.mmap(file.fileno(), chunk_bytes), dtype=torch.uint8)
        if torch.cuda.is_available():
            return torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True)
        return host_memory(chunk_bytes)


def host_memory(count: int) -> Tensor:
    """Returns (count,) uint8 zeros on large pages where there are any: random rows then miss the
    page tables less often.
    """
    # private: shared pages are always small
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def touched(memory: Tensor) -> Tensor:
    """Returns ``memory`` (n,) uint8 with every page of it there, on one thread and without torch.

    An operation of torch in a thread of ours leaves a second team of OpenMP threads behind. With
    more of them than cores, the runtime lets all of them sleep at once when they wait: the
    learner's step then takes twice as long.
    """
    if memory.device.type == "cpu":
        ctypes.memset(memory.data_ptr(), 0, memory.nbytes)
    return memory


def readable(count: float) -> str:
    """Returns bytes in the largest unit that leaves a number above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
