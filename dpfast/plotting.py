"""The look of all figures: colours, axes, and names at the ends of lines."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision
COLORS = {"dp": "#0072B2", "static": "#D55E00", "prune": "#009E73", "dynamic": "#CC79A7"}
COLORS |= {"mix": "#56B4E9", "real": "#000000", "pool": "#E69F00"}
INK, MUTED = "#1f2328", "#6b7280"


def axes_of(size: tuple[float, float], x: str, y: str) -> tuple[Figure, Any]:
    """Returns a figure of ``size`` inches with one pair of axes."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    styled(axes, x, y)
    return figure, axes


def styled(axes: Any, x: str, y: str) -> None:
    """Gives axes the look of all figures, and their labels."""
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.tick_params(colors=MUTED, length=3)
    axes.grid(axis="y", color="#e5e7eb", lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c4c8ce")


def label_ends(axes: Any, ends: list[tuple[str, float, float, str]]) -> None:
    """Names (name, x, y, colour) at the right ends of lines, moved apart where they would touch."""
    low, high = axes.get_ylim()
    least, last = 0.06 * (high - low), -np.inf
    for name, x, y, color in sorted(ends, key=lambda end: end[2]):
        last = max(y, last + least)
        axes.annotate(
            name,
            (x, last),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            weight="bold",
        )
    axes.margins(x=0.02)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.12 * (right - left))
