"""What new samples were at their birth, as Markdown: means over the runs of an arm that were
watched (``benchmarks.studies.births``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean
from typing import Any

from benchmarks.studies.tables import table
from dpfast.textfiles import NUMBER, Kind

Line = dict[str, Any]
HEAD = [
    "part, arm, samples",
    "runs",
    "judges agree, %",
    "learner wrong, %",
    "useful, %",
    "nearest earlier",
    "Fréchet",
    "precision, %",
    "recall, %",
]

NAMES = ("agreed", "learner_wrong", "useful", "frechet", "precision", "recall")


def _is_told(value: Any, needed: str) -> bool:
    return (
        isinstance(value, dict)
        and NUMBER.holds(value.get(needed))
        and all(NUMBER.holds(value[name]) for name in NAMES if name in value)
    )


def _is_births(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    added, rounds = value.get("added"), value.get("rounds")
    return (
        _is_told(added or value.get("pool"), "frechet")
        and isinstance(rounds, list)
        and all(_is_told(told, "round") for told in rounds)
    )


BIRTHS = Kind(_is_births, "null, or a table with added or pool, of numbers, and rounds")


def births_tables(lines: Iterable[Line]) -> Iterator[str]:
    """Two tables, of the samples that rounds added as a whole and by round; nothing where no run
    was watched.

    Arms of one size compare; Fréchet distance, precision and recall depend on the number of
    samples. Without rounds a run has only its pool's.
    """
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if line.get("births"):
            groups[f"{line['part']}, {line['arm']}, {line['size']:,}"].append(line)
    if not groups:
        return
    yield from table(HEAD, ([name, *_whole(runs)] for name, runs in groups.items()))
    added = {name: rows for name, runs in groups.items() if (rows := _rounds(runs))}
    most = max(map(len, added.values()), default=0)
    if most:
        yield "By round, %: judges agree / useful / learner wrong."
        head = ["part, arm, samples", *(f"round {number}" for number in range(1, most + 1))]
        yield from table(
            head, ([name, *rows, *[""] * (most - len(rows))] for name, rows in added.items())
        )


def _whole(runs: Sequence[Line]) -> list[str]:
    added = [run["births"].get("added") or run["births"]["pool"] for run in runs]
    shares = [_percent(added, name) for name in ("agreed", "learner_wrong", "useful")]
    near = [run["nearest"] for run in runs if run.get("nearest") is not None]
    distance = f"{mean(each['frechet'] for each in added):.2f}"
    diverse = [_percent(added, name) for name in ("precision", "recall")]
    return [str(len(runs)), *shares, f"{mean(near):.3f}" if near else "", distance, *diverse]


def _rounds(runs: Sequence[Line]) -> list[str]:
    """A cell for each round that any of the runs has, over those that have it."""
    rounds: dict[int, list[Line]] = defaultdict(list)
    for run in runs:
        for told in run["births"]["rounds"]:
            rounds[told["round"]].append(told)
    return [
        " / ".join(_percent(rounds[number], name) for name in ("agreed", "useful", "learner_wrong"))
        for number in sorted(rounds)
    ]


def _percent(of: Sequence[Line], name: str) -> str:
    values = [each[name] for each in of if name in each]
    return f"{100 * mean(values):.1f}" if values else ""
