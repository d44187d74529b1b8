"""Finished runs as points to compare: held-out accuracy against samples, of equal settings, and
sweeps of one field.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from dpfast.errors import InputError
from dpfast.report.runs import ORDER, Run
from dpfast.textfiles import COUNT, NUMBER, SHARE, TABLE, TEXT, WHOLE, check_table, read_json_lines

# fields that say which run it is, or what it writes down, not how it learns
IDENTITY = {"name", "seed", "sources", "device", "evaluation", "callbacks", "trackers"}
IDENTITY |= {"checkpoints_kept", "keep_rounds", "learner.seed", "real", "pool_from", "reuse"}
# of a study's line, and of its fields those that are reckoned with
NEEDED = {"source": TEXT, "samples": COUNT, "test_accuracy": SHARE}
KNOWN = {"fields": TABLE, "flops": NUMBER.or_null(), "validation_accuracy": SHARE.or_null()}
FIELDS = {
    "seed": WHOLE.or_null(),
    "maximum_samples": WHOLE,
    "iterations": WHOLE,
    "omega": NUMBER,
    "anchor": NUMBER.or_null(),
    "oversample": NUMBER,
}
SIZE = {"maximum_samples", "initial_samples", "round_samples", "pool_rounds"}


@dataclass(frozen=True)
class Point:
    """One finished source. accuracy: held-out, in [0, 1]; flops: of its generation, None where
    nobody counted; validation: accuracy there, None where it is not known; run: its name.
    """

    source: str
    samples: int
    accuracy: float
    fields: dict[str, Any]
    flops: float | None = None
    validation: float | None = None
    run: str = ""

    @property
    def seed(self) -> Any:
        """The seed, which tells it from other runs of the same settings; None where it is not
        known.
        """
        own = self.fields.get("learner.seed")
        return self.fields.get("seed") if own is None else own

    def setting(self, *without: str) -> str:
        """Returns the recipe's fields that two runs must share to be compared, those named left
        out.
        """
        return json.dumps(
            {k: v for k, v in sorted(self.fields.items()) if k not in IDENTITY | {*without}}
        )


def points_of_runs(runs: Iterable[Run]) -> list[Point]:
    return [
        Point(
            m["source"],
            m["samples"],
            m["test_accuracy"],
            run.fields,
            run.total("generation", "flops", m["source"]),
            m.get("validation_accuracy"),
            run.path.name,
        )
        for run in runs
        for m in run.events("result")
        if "test_accuracy" in m
    ]


def points_of_study(path: Path) -> list[Point]:
    """Returns the lines of a study: "source", "samples", "test_accuracy", and where they are known
    "fields" and "flops".

    Raises ``InputError`` for a file that cannot be read, and with its line for a value of another
    kind.
    """
    try:
        lines = list(read_json_lines(path))
    except FileNotFoundError:
        raise InputError(f"study = {str(path)!r}: no such file") from None
    points = []
    for number, line in lines:
        where = f"{path}, line {number}"
        check_table(line, where, NEEDED, KNOWN)
        fields = line.get("fields", {})
        check_table(fields, f"{where}, fields", {}, FIELDS)
        points.append(
            Point(
                line["source"],
                line["samples"],
                line["test_accuracy"],
                fields,
                line.get("flops"),
                line.get("validation_accuracy"),
                f"line {number}",
            )
        )
    return points


def left_out(runs: Iterable[Run]) -> list[str]:
    """Returns the reasons why sources of runs are no points, in words."""
    return [
        f"{run.path.name}, {source}: {reason}"
        for run in runs
        for source in run.sources or ["no source"]
        if (reason := _missing(run, source))
    ]


def _missing(run: Run, source: str) -> str:
    results = run.events("result", source)
    if any("test_accuracy" in result for result in results):
        return ""
    if results:
        return "its result has no held-out accuracy"
    last = max((m["step"] for m in run.metrics if m["source"] == source), default=0)
    return f"unfinished, at iteration {last}"


def on_validation(points: Iterable[Point]) -> tuple[list[Point], list[str]]:
    """Returns the points with their validation accuracy as ``accuracy``, and in words those
    without.
    """
    points = list(points)
    known = [replace(p, accuracy=p.validation) for p in points if p.validation is not None]
    missing = [f"{p.run}, {p.source}: its result has no validation accuracy" for p in points]
    return known, [text for text, p in zip(missing, points, strict=True) if p.validation is None]


def usual(points: Iterable[Point]) -> list[Point]:
    """Returns the largest part of the points, by sources and then by number, that share everything
    but size and seed.
    """
    groups = defaultdict(list)
    for point in points:
        groups[point.setting(*SIZE)].append(point)
    return max(
        groups.values(), key=lambda group: (len({p.source for p in group}), len(group)), default=[]
    )


def sweep(points: Iterable[Point], source: str, field: str) -> dict[float, list[Point]]:
    """Returns the points of one source that differ in one field and the seed alone, most values
    first; {} with only one.
    """
    groups: dict[str, dict[float, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        if point.source == source and field in point.fields:
            groups[point.setting(field)][point.fields[field]].append(point)
    best = max(groups.values(), key=len, default={})
    return {value: best[value] for value in sorted(best)} if len(best) > 1 else {}


def lead(points: list[Point]) -> str:
    """Returns one sentence that ranks the sources at the largest size that all of them have, ""
    with fewer than two.
    """
    same = usual(points)
    sources = sorted(
        {p.source for p in same}, key=lambda s: (ORDER.index(s) if s in ORDER else len(ORDER), s)
    )
    if len(sources) < 2:
        return ""
    common = set.intersection(*({p.samples for p in same if p.source == s} for s in sources))
    size = max(common) if common else None
    chosen = {
        s: [p.accuracy for p in same if p.source == s and size in (None, p.samples)]
        for s in sources
    }
    ranked = sorted(sources, key=lambda s: -mean(chosen[s]))
    first, top = ranked[0], mean(chosen[ranked[0]])
    others = ", ".join(
        f"{100 * (top - mean(chosen[s])):.1f} points above {s} ({mean(chosen[s]):.1%})"
        for s in ranked[1:]
    )
    counts = sorted({len(values) for values in chosen.values()})
    runs = f"{'-'.join(map(str, {counts[0]: 0, counts[-1]: 0}))} run(s) each"
    where = f"with {size:,} samples" if size is not None else "of any size"
    return f"{first} reaches {top:.1%} on held-out images, {others}; means of {runs} {where}."
