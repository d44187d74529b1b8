"""The theory figures of the paper. What it leaves open is chosen here, named in the figure, and
varied.

Fig. 3 states d = 512 and the fractions, Fig. 5c nothing, Fig. 7 d, n and the ridges. The paper's
penalty is that of the mean over the pool, so that of a kept sample is ridge / keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dpfast.errors import InputError
from dpfast.plotting import COLORS, INK, MUTED, styled
from dpfast.theory.cells import Arguments, Array
from dpfast.theory.charts import Chart, Line, Panel, curves, draw
from dpfast.theory.scalars import quadrature
from dpfast.theory.theorem import test_error

NOTE = "Lines: theory. Points: simulation, {draws} draws, bars of 2 standard errors."
HARD, EASY = COLORS["dp"], COLORS["static"]


def selected_sizes() -> Chart:
    """Returns Fig. 3: accuracy against the number of selected samples, for pools that are selected
    more or less sharply.
    """
    keeps = (1.0, 0.9, 0.8, 0.5, 0.1)
    names = ("all", "top 90 %", "top 80 %", "top 50 %", "top 10 %")

    def experiment(kept: Array, keep: float, rho: float, ridge: float) -> Arguments:
        return {"d": 512, "n": kept / keep, "keep": keep, "rho": rho, "ridge": ridge}

    def panel(rho: float, ridge: float) -> Panel:
        lines = [
            Line(
                name=name,
                color=color,
                experiment=partial(experiment, keep=keep, rho=rho, ridge=ridge),
                x=np.geomspace(128, 8192, 200),
                points=2.0 ** np.arange(7, 13.5, 1),
            )
            for name, keep, color in zip(names, keeps, [MUTED, *_shades(4)], strict=True)
        ]
        legend = "lower right" if (rho, ridge) == (1, 1e-3) else None
        return Panel(f"rho = {rho:g}, ridge = {ridge:g}", lines, legend=legend)

    return Chart(
        title="Selecting the hardest samples, d = 512 (Fig. 3). " + NOTE,
        x="selected samples",
        panels=[[panel(rho, ridge) for ridge in (1e-3, 1e-2, 1e-1)] for rho in (1.0, 0.9)],
        size=(12, 7),
        limits=(50, 100),
        octaves=True,
    )


def oversampling() -> Chart:
    """Returns Fig. 5c: accuracy against candidates for each kept sample, at a fixed number of kept
    samples.
    """

    def experiment(ratio: Array, kept: int, rho: float, ridge: float) -> Arguments:
        return {"d": 512, "n": kept * ratio, "keep": 1 / ratio, "rho": rho, "ridge": ridge}

    def line(name: str, color: str, kept: int, rho: float, ridge: float) -> Line:
        return Line(
            name=name,
            color=color,
            experiment=partial(experiment, kept=kept, rho=rho, ridge=ridge),
            x=np.geomspace(1, 20, 200),
            points=np.array([1, 1.5, 2, 3, 4, 6, 8, 12, 16]),
        )

    ridges, sizes = (1e-1, 1e-2, 1e-3, 1e-4), (256, 1024, 2048, 4096)
    by_ridge = [
        Panel(
            f"rho = {rho:g}, 2,048 kept",
            [
                line(f"ridge {r:g}", c, 2048, rho, r)
                for r, c in zip(ridges, _shades(4), strict=True)
            ],
            legend="lower left" if rho == 1 else None,
        )
        for rho in (1.0, 0.9)
    ]
    by_size = Panel(
        "rho = 0.9, ridge = 0.01",
        [line(f"{k:,} kept", c, k, 0.9, 1e-2) for k, c in zip(sizes, _shades(4), strict=True)],
        legend="upper right",
    )
    return Chart(
        title="Keeping the hardest of more candidates, d = 512 (Fig. 5c). " + NOTE,
        x="candidates for each kept sample",
        panels=[[*by_ridge, by_size]],
        size=(12, 4),
        limits=(50, 100),
    )


def easy_or_hard() -> Chart:
    """Returns Fig. 7: the error of keeping the easiest and the hardest fraction of a pool."""
    d = 350

    def experiment(keep: Array, n: int, rho: float, ridge: float, strategy: str) -> Arguments:
        return {"d": d, "n": n, "keep": keep, "rho": rho, "ridge": ridge, "strategy": strategy}

    def panel(n: int, ridge: float) -> Panel:
        lines = [
            Line(
                name=f"{strategy}, rho = {rho:g}",
                color=color,
                experiment=partial(experiment, n=n, rho=rho, ridge=ridge, strategy=strategy),
                x=np.linspace(0.02, 1, 400),
                points=np.linspace(0.1, 0.9, 9),
                dashed=rho < 1,
            )
            for strategy, color in (("easy", EASY), ("hard", HARD))
            for rho in (1.0, 0.7)
        ]
        place = "lower left" if (n, ridge) == (250, 1e-6) else None
        return Panel(f"n = {n:,}, ridge = {ridge:g}", lines, (d / n,) if d < n else (), place)

    return Chart(
        title="Keeping the easiest or the hardest fraction of n samples, d = 350 (Fig. 7). " + NOTE,
        x="fraction kept",
        panels=[[panel(n, ridge) for n in (250, 600, 1000)] for ridge in (1e-6, 1e-2)],
        size=(12, 7),
        limits=(10, 50),
        accuracy=False,
    )


CHARTS = {
    "selected_sizes": selected_sizes,
    "oversampling": oversampling,
    "easy_or_hard": easy_or_hard,
}


class DrawnFigure(NamedTuple):
    """A figure's file, its number of simulated points, and how far the theory is from them."""

    path: Path
    points: int
    largest: float
    mean: float
    stderr: float


def _shades(count: int) -> list[str]:
    """Returns colours of an ordered quantity, from light to dark."""
    ramp = matplotlib.colormaps["YlGnBu"]
    return [matplotlib.colors.to_hex(ramp(x)) for x in np.linspace(0.4, 1, count)]


def study(
    sweeps: Sequence[tuple[str, str, str, Mapping[float, Sequence[tuple[int, float]]]]],
) -> Figure:
    """Returns the study's sweeps of omega and of oversampling above the theory's: gains over no
    selection, in points.

    Guidance draws samples of a tilted density rather than from a pool; its counterpart is the soft
    rule, whose power tilts the density of the projection in the same way. Penalties are those of a
    kept sample, as in training.

    sweeps: of oversampling and of omega, as ``dpfast.report.sweeps.measured_sweeps`` gives them.
    Raises ``InputError`` where one of them is empty.
    """
    d = 512
    rho = 0.9
    ridge = 1e-3

    def tilted(power: Array, kept: int) -> Arguments:
        def rule(t: Array, w: float) -> Array:
            return np.asarray(np.cosh(t / 2) ** (-2 * w))

        keep = np.array([min(1.0, quadrature(partial(rule, w=w), 0.0).p) for w in power])  # rounded
        given: Arguments = {
            "d": d,
            "n": kept / keep,
            "keep": keep,
            "rho": rho,
            "ridge": ridge * keep,
        }
        return {**given, "strategy": "soft", "power": power}

    def oversampled(ratio: Array, kept: int) -> Arguments:
        return {"d": d, "n": kept * ratio, "keep": 1 / ratio, "rho": rho, "ridge": ridge / ratio}

    figure = Figure(figsize=(9, 6.5), layout="constrained", facecolor="white")
    grid = figure.subplots(2, 2)
    theory = (
        ("candidates for each kept sample", np.linspace(1, 16, 61), oversampled),
        ("power of the soft rule", np.linspace(0, 12, 61), tilted),
    )
    for (top, bottom), (source, field, label, values), (x_label, x, experiment) in zip(
        grid.T, sweeps, theory, strict=True
    ):
        if not values:
            raise InputError(f"study: no runs of {source} that differ in {field} alone")
        styled(top, label, f"measured gain of {source}, points")
        base = dict(next(iter(values.values())))
        gains = [
            [100 * (accuracy - base[seed]) for seed, accuracy in group if seed in base]
            for group in values.values()
        ]
        spread = [float(np.std(gain, ddof=1)) if len(gain) > 1 else 0.0 for gain in gains]
        top.errorbar(
            list(values),
            [np.mean(g) for g in gains],
            spread,
            fmt="o-",
            color=COLORS[source],
            capsize=3,
        )
        styled(bottom, x_label, "predicted gain, points")
        for kept, color in zip((512, 2048, 8192), _shades(3), strict=True):
            error = test_error(**experiment(x, kept))
            bottom.plot(x, 100 * (error[0] - error), color=color, label=f"{kept:,} kept")
        bottom.legend(frameon=False, fontsize=8, labelcolor="linecolor")
    for axes in grid.ravel():
        axes.axhline(0, color=MUTED, lw=0.8, zorder=0)
    model = f"rho = {rho}, ridge {ridge:g} a kept sample, d = {d}"
    text = f"Above: measured, bars of 1 standard deviation. Below: theory, {model}."
    figure.suptitle(text, color=INK, fontsize=10, x=0.01, ha="left")
    return figure


def write(out: Path, *, draws: int = 20, seed: int = 0) -> list[DrawnFigure]:
    """Draws the figures of the paper into the folder ``out``, as PNG."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in CHARTS.items():
        chart = make()
        made = curves(chart.lines, draws=draws, seed=seed)
        figure = draw(chart, made, draws)
        path = out / f"{name}.png"
        figure.savefig(path, dpi=110)
        off = np.concatenate([np.abs(c.predicted - c.simulated) for c in made])
        error = np.concatenate([c.stderr for c in made])
        written.append(
            DrawnFigure(path, off.size, float(off.max()), float(off.mean()), float(error.mean()))
        )
    return written
