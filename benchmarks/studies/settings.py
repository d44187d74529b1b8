"""What all runs of the study share, and the options that are tried beside it."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]
COMMON: Fields = {
    "steps": 8,
    "every": 2,
    "omega": 0.05,
    "patience_growth": "fixed",
    "oversample": 4.0,
}
# factors of an anchor that is late: 1 in the second half of the steps, of eight the last four
LATE = ((0.375, 0.0), (0.5, 1.0))
OPTIONS: tuple[Fields, ...] = (
    {"allot": "difficulty"},
    {"early_candidates": 2.0, "early_until": 0.375},
    {"restart": 0.5},
    {"criterion": "disagreement"},
)
SIZE = ("sources", "seed", "iterations", "maximum_samples", "initial_samples", "round_samples")


def setting(fields: Fields) -> Fields:
    """The fields that are not a run's source, seed and size."""
    return {name: value for name, value in fields.items() if name not in SIZE}
