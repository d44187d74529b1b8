"""Charts of the theory: predicted lines, with simulated means and their standard errors on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dpfast.plotting import INK, MUTED, styled
from dpfast.theory.cells import Arguments, Array
from dpfast.theory.simulate import simulate
from dpfast.theory.theorem import test_error


@dataclass(frozen=True, kw_only=True)
class Line:
    """A family of experiments. experiment: x (k,) -> arguments of ``test_error``; points: the x
    that are simulated.
    """

    name: str
    color: str
    experiment: Callable[[Array], Arguments]
    x: Array
    points: Array
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel of a chart. title: what distinguishes it; marks: x of vertical lines; legend: where
    the lines' names stand, if anywhere.
    """

    title: str
    lines: Sequence[Line]
    marks: tuple[float, ...] = ()
    legend: str | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of panels in rows. accuracy: of the y axis, else the error, both in percent; octaves:
    x in steps of 2.
    """

    title: str
    x: str
    panels: Sequence[Sequence[Panel]]
    size: tuple[float, float]
    limits: tuple[float, float]
    accuracy: bool = True
    octaves: bool = False

    @property
    def lines(self) -> list[Line]:
        return [line for panel in chain(*self.panels) for line in panel.lines]


class Curve(NamedTuple):
    """Test errors of a line, and at its points those that were predicted and simulated."""

    error: Array
    predicted: Array
    simulated: Array
    stderr: Array


def curves(lines: Sequence[Line], *, draws: int = 20, seed: int = 0) -> list[Curve]:
    """Computes what the lines of a chart show. Cells of one pool share its draws, so their
    deviations are correlated.
    """
    at_points = [line.experiment(line.points) for line in lines]
    for cells in at_points:
        cells["n"] = np.rint(cells["n"])
    batches: dict[tuple[str, float], list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
    for i, (line, cells) in enumerate(zip(lines, at_points, strict=True)):
        for j in range(len(line.points)):
            cell = {
                name: _entry(value, j)
                for name, value in cells.items()
                if name not in ("strategy", "power")
            }
            kind = str(cells.get("strategy", "hard")), float(_entry(cells.get("power", 1.0), j))
            batches[kind].append((i, j, cell))
    found = [np.empty((2, len(line.points))) for line in lines]
    for (strategy, power), batch in batches.items():
        table: Any = {name: np.array([cell[name] for *_, cell in batch]) for name in batch[0][2]}
        results = simulate(**table, strategy=strategy, power=power, draws=draws, seed=seed)
        for (i, j, _), *result in zip(batch, *results, strict=True):
            found[i][:, j] = result
    return [
        Curve(
            test_error(**line.experiment(line.x)),
            np.broadcast_to(test_error(**cells), len(line.points)),
            *result,
        )
        for line, cells, result in zip(lines, at_points, found, strict=True)
    ]


def _entry(value: Any, j: int) -> Any:
    return value[j] if np.ndim(value) else value


def draw(chart: Chart, made: Sequence[Curve], draws: int) -> Figure:
    """Draws the chart of ``curves(chart.lines, draws=draws)``; bars are two standard errors to
    either side.
    """
    figure = Figure(figsize=chart.size, layout="constrained", facecolor="white")
    figure.suptitle(chart.title.format(draws=draws), color=INK, fontsize=10.5, x=0.01, ha="left")
    grid = figure.subplots(
        len(chart.panels), len(chart.panels[0]), sharex=True, sharey=True, squeeze=False
    )
    left, rest = "test accuracy, %" if chart.accuracy else "test error, %", iter(made)
    for row, (panels, places) in enumerate(zip(chart.panels, grid, strict=True)):
        for column, (panel, axes) in enumerate(zip(panels, places, strict=True)):
            styled(
                axes, chart.x if row == len(chart.panels) - 1 else "", left if column == 0 else ""
            )
            axes.set_title(panel.title, fontsize=9.5, color=INK, loc="left")
            axes.set_ylim(*chart.limits)
            for mark in panel.marks:
                axes.axvline(mark, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=0)
            _panel(axes, panel, [next(rest) for _ in panel.lines], chart)
    return figure


def _panel(axes: Any, panel: Panel, made: Sequence[Curve], chart: Chart) -> None:
    if chart.octaves:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        axes.xaxis.set_minor_locator(NullLocator())
    for line, curve in zip(panel.lines, made, strict=True):
        shown, mean = (
            100 * (1 - e if chart.accuracy else e) for e in (curve.error, curve.simulated)
        )
        axes.plot(
            line.x,
            shown,
            color=line.color,
            lw=1.4,
            ls=(0, (4, 2)) if line.dashed else "-",
            label=line.name,
        )
        axes.errorbar(
            line.points,
            mean,
            200 * curve.stderr,
            fmt="o",
            ms=2.8,
            color=line.color,
            capsize=2,
            lw=0.9,
            zorder=3,
        )
    if panel.legend is not None:
        axes.legend(loc=panel.legend, frameon=False, fontsize=8, labelcolor="linecolor")
