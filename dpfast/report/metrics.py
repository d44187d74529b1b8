"""The final tables of a run, as text."""

from __future__ import annotations

from collections.abc import Sequence

from dpfast.evaluate.measures import SHOTS
from dpfast.practice.result import Result


def result_table(results: list[Result]) -> str:
    """Returns the final tables as text, accuracies on real images: one row per source; of runs with
    class counts another by the shots of a class; then one per further set and source.
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
    tables = [_aligned(header, rows)]
    if any(r.test.shots for r in results):
        shots = [
            (r.source, *(shots_text(*r.test.shots.get(name, (None, None))) for name in SHOTS))
            for r in results
        ]
        tables.append(_aligned(("held-out test", *SHOTS.values()), shots))
    if sets:
        tables.append(
            _aligned(("source", "set", "images", "top-1", "top-5", "calibration error"), sets)
        )
    return "\n\n".join(tables)


def shots_text(accuracy: float | None, classes: int | None) -> str:
    """Returns the mean accuracy of a group of classes, and how many they are where that is
    known.
    """
    if accuracy is None:
        return "-"
    return f"{accuracy:.2%}" + ("" if classes is None else f" of {classes}")


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
