"""The number of CPUs that this job may use on this machine, and who says so.

The least of these counts: the CPUs that the scheduler may put this process on (taskset, Slurm,
cpuset groups), the quota of its control groups (cpu.max; cpu.cfs_quota_us), and Slurm's share of
the node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpfast.hardware.cgroups import ROOT, groups, lines, number


@dataclass(frozen=True, order=True)
class Count:
    """A number of CPUs, and ``source``, who says so."""

    cpus: int
    source: str


def cpu_counts(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> list[Count]:
    """Returns the word of every source, the least number first, which counts; never empty."""
    if hasattr(os, "sched_getaffinity"):
        found = [Count(len(os.sched_getaffinity(0)), "the CPUs of this process")]
    else:
        found = [Count(os.cpu_count() or 1, "the CPUs of the machine")]
    found += _of_groups(root)
    share = environ.get("SLURM_CPUS_ON_NODE", "")
    if share.isdecimal() and int(share):
        found.append(Count(int(share), "SLURM_CPUS_ON_NODE"))
    return sorted(found, key=lambda count: count.cpus)


def cpus() -> int:
    """Returns CPUs that the processes of this job may use on this machine, all together."""
    return cpu_counts()[0].cpus


def _of_groups(root: Path) -> Iterator[Count]:
    for version, folder in groups("cpu", root):
        if version == 2:
            name = "cpu.max"
            words = " ".join(
                lines(folder / name)
            ).split()  # "max 100000", or microseconds of a period
            quota, period = (
                int(word) if word.isdecimal() else None for word in (*words, "", "")[:2]
            )
        else:
            name = "cpu.cfs_quota_us"
            quota, period = number(folder / name), number(folder / "cpu.cfs_period_us")
        if quota and period:
            yield Count(max(quota // period, 1), f"/{(folder / name).relative_to(root)}")
