"""The host memory that is free to the processes of this job on this machine, and who says so.

The least of what these say counts:

    /proc/meminfo   MemAvailable, what the kernel would give without swapping
    control groups  of version 2 memory.max and memory.high, of version 1 memory.limit_in_bytes, of
                    this group and of all around it, minus what is used. Page cache does not count
                    as used: the kernel drops it before it ends a process. Memory in /dev/shm does
    Slurm           --mem, --mem-per-cpu or --mem-per-gpu of the job on this node, minus what its
                    ranks hold: this process's resident memory times the ranks on this machine,
                    which are alike
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dpfast.hardware.cgroups import ROOT, groups, lines, number
from dpfast.launch import local_world_size

MIB = 1 << 20
UNLIMITED = 1 << 60  # version 1 has no word for no limit, but the largest number of pages
CACHE = {
    1: ("total_active_file", "total_inactive_file"),
    2: ("active_file", "inactive_file", "slab_reclaimable"),
}
UNITS = {"": MIB, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, order=True)
class Free:
    """Free host memory. bytes: free by the word of ``source``; limit: of which, where there is
    one.
    """

    bytes: int
    source: str
    limit: int | None = None


def free_memory(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> list[Free]:
    """Returns the word of every source, the least number first, which counts; never empty.

    Where no kernel says anything half of the machine's memory is taken for free.
    """
    found = [*_available(root), *_of_groups(root), *_of_slurm(root, environ)]
    if not found:
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        found.append(Free(half, "half of the machine's memory"))
    return sorted(found, key=lambda free: free.bytes)


def free_bytes() -> int:
    """Returns bytes of host memory that the processes of this job may still take on this machine,
    all together.
    """
    return free_memory()[0].bytes


def available_bytes(device: torch.device) -> int:
    """Returns free memory of a GPU; of a CPU this rank's part of what is free to the job."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes() // local_world_size()


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process has held: of a GPU what torch allocated, on a CPU
    resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def _available(root: Path) -> Iterator[Free]:
    for line in lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield Free(int(line.split()[1]) * 1024, "MemAvailable of /proc/meminfo")


def _of_groups(root: Path) -> Iterator[Free]:
    names = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
    current = {1: "memory.usage_in_bytes", 2: "memory.current"}
    for version, folder in groups("memory", root):
        limits = {folder / name: number(folder / name) for name in names[version]}
        used = number(folder / current[version])
        if used is None:
            continue
        pairs = (line.split() for line in lines(folder / "memory.stat"))
        cache = sum(int(value) for name, value in pairs if name in CACHE[version])
        for file, limit in limits.items():
            if limit is not None and limit < UNLIMITED:
                yield Free(
                    max(limit - max(used - cache, 0), 0), f"/{file.relative_to(root)}", limit
                )


def _of_slurm(root: Path, environ: Mapping[str, str]) -> Iterator[Free]:
    job = {
        "SLURM_MEM_PER_NODE": 1,
        "SLURM_MEM_PER_CPU": _count(environ.get("SLURM_CPUS_ON_NODE")),
        "SLURM_MEM_PER_GPU": _count(environ.get("SLURM_GPUS_ON_NODE")),
    }
    resident = next(
        (
            int(line.split()[1]) * 1024
            for line in lines(root / "proc/self/status")
            if line.startswith("VmRSS:")
        ),
        0,
    )
    for name, times in job.items():
        amount = re.fullmatch(r"(\d+)([KMGT]?)", environ.get(name, ""))
        if amount is None or not times or not int(amount[1]):  # 0: all memory of the node
            continue
        limit = int(amount[1]) * UNITS[amount[2]] * times
        yield Free(max(limit - resident * local_world_size(environ), 0), name, limit)


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0
