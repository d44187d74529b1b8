"""The final tables of a run, as text."""

from __future__ import annotations

from dpfast.evaluate.measures import SHOTS
from dpfast.practice.result import Result
from dpfast.terminal import table


def result_table(results: list[Result], columns: int | None = None) -> str:
    """Returns the final tables as text, accuracies on real images: one row per source; of runs with
    class counts another by the shots of a class; then one per further set and source.

    columns: of the terminal, as of ``dpfast.terminal.table``.
    """
    header = (
        "source",
        "samples",
        "iterations",
        "additions",
        "validation",
        "held-out test",
        "generation",
        "training",
        "loader wait",
    )
    rows = [
        (
            r.source,
            str(len(r.pool)),
            str(r.iterations),
            str(r.additions),
            f"{r.validation.top1:.2%}",
            f"{r.test.top1:.2%}",
            f"{r.generation_seconds:.0f} s",
            f"{r.training_seconds:.0f} s",
            f"{r.loader_wait:.2%}",
        )
        for r in results
    ]
    sets = [
        (
            r.source,
            row.name if row.severity is None else f"{row.name} {row.severity}",
            str(row.images),
            f"{row.result.top1:.2%}",
            f"{row.result.top5:.2%}",
            f"{row.result.calibration_error:.3f}",
        )
        for r in results
        for row in r.sets
    ]
    tables = [table([header, *rows], left=(), rule=True, columns=columns)]
    if any(r.test.shots for r in results):
        shots = [
            (r.source, *(shots_text(*r.test.shots.get(name, (None, None))) for name in SHOTS))
            for r in results
        ]
        shots.insert(0, ("held-out test", *SHOTS.values()))
        tables.append(table(shots, left=(), rule=True, columns=columns))
    if sets:
        sets.insert(0, ("source", "set", "images", "top-1", "top-5", "calibration error"))
        tables.append(table(sets, left=(), rule=True, columns=columns))
    return "\n\n".join(tables)


def shots_text(accuracy: float | None, classes: int | None) -> str:
    """Returns the mean accuracy of a group of classes, and how many they are where that is
    known.
    """
    if accuracy is None:
        return "-"
    return f"{accuracy:.2%}" + ("" if classes is None else f" of {classes}")
