"""Reads what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpfast.practice.loop import Result


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``: dictionaries with "event", "source", "step" and the event's values."""
    with (Path(folder) / "metrics.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def result_table(results: list[Result]) -> str:
    """The final table as text: one row per source, accuracies of the EMA weights on real images."""
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
    rows = [header]
    for r in results:
        rows.append(
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
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
