"""What the study's options gain: against plain Deliberate Practice of the same size, and of the
same FLOPs.

An option that makes its samples dearer or cheaper is held against the accuracy that the plain loop
of the same seed has where it spends as many FLOPs on generation, interpolated in their logarithm
between the sizes that ran.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from benchmarks.studies.settings import COMMON, OPTIONS, setting

Line = dict[str, Any]


@dataclass(frozen=True)
class Gain:
    """One run of an option. accuracy in [0, 1]; flops: of generation, over those of the plain run
    of its size and seed; same_size, same_flops: accuracy over the plain run's; nearest:
    ``benchmarks.studies.study.nearest_earlier``.
    """

    accuracy: float
    flops: float
    same_size: float
    same_flops: float
    nearest: float


def gains(lines: Iterable[Line]) -> dict[str, list[Gain]]:
    """Option, as text -> its runs. Runs without a plain counterpart, or beyond its sizes in FLOPs,
    are left out.
    """
    plain: dict[tuple[int, int], list[Line]] = defaultdict(list)
    tried: list[tuple[str, Line]] = []
    for line in (line for line in lines if line["source"] == "dp"):
        key = line["fields"]["seed"], line["iterations"]
        if setting(line["fields"]) == COMMON:
            plain[key].append(line)
        tried += [(text(o), line) for o in OPTIONS if setting(line["fields"]) == COMMON | o]
    found: dict[str, list[Gain]] = {text(option): [] for option in OPTIONS}
    for name, line in tried:
        curve = sorted(
            plain[line["fields"]["seed"], line["iterations"]], key=lambda other: other["flops"]
        )
        twins = [
            o for o in curve if o["fields"]["maximum_samples"] == line["fields"]["maximum_samples"]
        ]
        equal = at(line["flops"], [(o["flops"], o["test_accuracy"]) for o in curve])
        if twins and equal is not None:
            top, twin = line["test_accuracy"], twins[0]
            gain = (
                top,
                line["flops"] / twin["flops"],
                top - twin["test_accuracy"],
                top - equal,
                line["nearest"],
            )
            found[name].append(Gain(*gain))
    return {name: runs for name, runs in found.items() if runs}


def at(flops: float, curve: list[tuple[float, float]]) -> float | None:
    """The accuracy of rising (flops, accuracy) points at ``flops``; None outside of them."""
    for (low, below), (high, above) in pairwise(curve):
        if low <= flops <= high:
            return (
                below + (above - below) * math.log(flops / low) / math.log(high / low)
                if high > low
                else below
            )
    return None


def text(option: Line) -> str:
    return ", ".join(f"{name} = {value}" for name, value in option.items())


def rows(lines: Iterable[Line]) -> Iterator[list[str]]:
    """HEAD's cells of every option: means over seeds, with the standard deviation of a single
    run.
    """
    for name, runs in gains(lines).items():
        points = [
            [100 * getattr(run, key) for run in runs]
            for key in ("accuracy", "same_size", "same_flops")
        ]
        spread = [f" ± {stdev(values):.2f}" if len(values) > 1 else "" for values in points]
        accuracy, size, flops = (mean(values) for values in points)
        cost, nearest = mean(run.flops for run in runs), mean(run.nearest for run in runs)
        yield [
            name,
            str(len(runs)),
            f"{accuracy:.2f}{spread[0]}",
            f"{cost:.2f}x",
            f"{size:+.2f}{spread[1]}",
            f"{flops:+.2f}{spread[2]}",
            f"{nearest:.3f}",
        ]


HEAD = [
    "dp, option",
    "seeds",
    "accuracy",
    "FLOPs",
    "against the same size",
    "against the same FLOPs",
    "nearest earlier",
]
