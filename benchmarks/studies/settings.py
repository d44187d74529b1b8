"""What all runs of the study share, and the options that are tried beside it."""

from __future__ import annotations

from typing import Any

from dpfast.config import Recipe

Fields = dict[str, Any]
COMMON: Fields = {
    "steps": 8,
    "every": 2,
    "omega": 0.05,
    "patience_growth": "fixed",
    "oversample": 4.0,
}
PAPER: Fields = {"omega": 0.05, "anchor": 0.0, "anchor_schedule": ()}  # what fields leave unsaid
OPTIONS: tuple[Fields, ...] = (
    {"allot": "difficulty"},
    {"early_candidates": 2.0, "early_until": 0.375},
    {"restart": 0.5},
    {"criterion": "disagreement"},
)
SIZE = ("sources", "seed", "iterations", "maximum_samples", "initial_samples", "round_samples")


def late(begin: float = 0.5) -> tuple[tuple[float, float], ...]:
    """Factors of an anchor that begins, at its full strength, after this share of the steps."""
    return (begin - 1 / COMMON["steps"], 0.0), (begin, 1.0)


def recipe_of(fields: Fields) -> Recipe:
    """The embedded recipe with a run's fields, guided as the paper does where they do not say."""
    return Recipe.load("fashion", **PAPER | fields)


def setting(fields: Fields) -> Fields:
    """The fields that are not a run's source, seed and size."""
    return {name: value for name, value in fields.items() if name not in SIZE}
