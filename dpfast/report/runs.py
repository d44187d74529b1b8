"""Run folders as a report reads them: whatever is there, finished or not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpfast.config import RECIPE_FILE, flat, read_recipe
from dpfast.errors import InputError
from dpfast.files import there
from dpfast.textfiles import lines, read_text

ORDER = ("dp", "mix", "dynamic", "prune", "static", "pool", "real")
TEXTS = ("event", "source", "name")  # of a line; its other values are numbers
LISTS = ("test_per_class",)
NEEDED = {  # what a line of an event holds in any case, beside event, source and step
    "addition": ("round", "entropy"),
    "result": ("samples",),
    "set": ("name", "images", "top1", "top5", "calibration_error", "entropy"),
    "generation": ("seconds",),
    "interval": ("seconds",),
}


@dataclass(frozen=True)
class Run:
    """One run folder. metrics, timings: the lines of its files; notes: what is missing or damaged,
    in words.
    """

    path: Path
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        """The sources that wrote metrics, Deliberate Practice first."""
        found = list(dict.fromkeys(m["source"] for m in self.metrics))
        return sorted(found, key=lambda s: (ORDER.index(s) if s in ORDER else len(ORDER), s))

    def events(self, event: str, source: str | None = None) -> list[dict[str, Any]]:
        """Returns the metrics of one kind, in their order."""
        return [m for m in self.metrics if m["event"] == event and source in (None, m["source"])]

    def total(self, event: str, key: str, source: str) -> float | None:
        """Returns the sum of a value over a source's "generation" or "training"; None where it was
        not written.
        """
        found = [
            t[key]
            for t in self.timings
            if t["event"] == event and t["source"] == source and key in t
        ]
        return sum(found) if found else None

    def share(self, event: str, source: str) -> float | None:
        """Returns the mean share of the peak over a source's "generation" or "interval" seconds;
        None where it is not known.
        """
        found = [
            t for t in self.timings if t["event"] == event and t["source"] == source and "mfu" in t
        ]
        seconds = sum(t["seconds"] for t in found)
        return sum(t["mfu"] * t["seconds"] for t in found) / seconds if seconds else None

    def highest(self, key: str, source: str) -> float | None:
        """Returns the largest of a value over a source's lines; None where it was not written."""
        return max(
            (t[key] for t in self.timings if t["source"] == source and key in t), default=None
        )

    @property
    def fields(self) -> dict[str, Any]:
        """The recipe's fields by their short names."""
        return flat(self.recipe)


def read_run(path: Path) -> Run:
    """Reads a run folder; a line that a kill cut short, or that holds other things than a run
    writes, is left out and noted.

    Raises ``InputError`` when ``path`` is no run folder.
    """
    if not there(path / RECIPE_FILE):
        raise InputError(f"run = {str(path)!r}: not the folder of a run, it has no recipe.json")
    notes: list[str] = []
    metrics, timings = (_lines(path / name, notes) for name in ("metrics.jsonl", "timings.jsonl"))
    run = Run(path, read_recipe(path / RECIPE_FILE), metrics, timings, notes)
    for source in run.sources:
        if not run.events("result", source):
            last = max((m["step"] for m in metrics if m["source"] == source), default=0)
            notes.append(
                f"{path.name}: {source} is unfinished, its last line is of iteration {last}"
            )
    if not metrics:
        notes.append(f"{path.name}: no evaluation has been written yet")
    return run


def read_runs(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """Reads runs that measure the same thing; those that cannot be read are named beside them, in
    words.

    Raises ``InputError`` where their real images differ, and where none can be read.
    """
    runs: list[Run] = []
    refused: list[InputError] = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except InputError as error:
            refused.append(error)
    if not runs and refused:
        raise refused[0]
    kinds = {str(run.recipe.get("validation")) for run in runs}
    if len(kinds) > 1:
        raise InputError(
            "runs: their real images differ "
            f"({', '.join(sorted(kinds))}); one report compares one set"
        )
    return runs, [str(error) for error in refused]


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Maps the recipe fields that are not the same in all runs, but for seed and name, to their
    values by run.
    """
    flat = [run.fields for run in runs]
    keys = sorted({key for one in flat for key in one} - {"seed", "name"})
    return {
        k: [one.get(k) for one in flat]
        for k in keys
        if len({json.dumps(one.get(k)) for one in flat}) > 1
    }


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not there(path):
        notes.append(f"{path.parent.name}: {path.name} is missing")
        return []
    rows = []
    for number, line in enumerate(lines(read_text(path)), 1):
        try:
            row = json.loads(line)
            wrong = _wrong(row)
        except (ValueError, RecursionError):
            wrong = "is cut short"
        if wrong is None:
            rows.append({key: value for key, value in row.items() if value is not None})
        else:
            notes.append(
                f"{path.parent.name}: line {number} of {path.name} {wrong} and was left out"
            )
    return rows


def _wrong(row: Any) -> str | None:
    """Returns the fault of a line of metrics or timings, in words; a null is a value that is not
    known.
    """
    if not isinstance(row, dict):
        return "is no table"
    for key, value in row.items():
        known = (str,) if key in TEXTS else (list,) if key in LISTS else (int, float)
        if value is not None and type(value) not in known:
            return f"has {key} = {json.dumps(value)}"
    for key in ("event", "source", "step", *NEEDED.get(row.get("event") or "", ())):
        if row.get(key) is None:
            return f"lacks {key}"
    return None
