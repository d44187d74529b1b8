"""Fig. 5 of the paper: accuracy and cost against oversampling and against omega."""

from __future__ import annotations

from statistics import mean, stdev
from typing import TypeAlias

from matplotlib.figure import Figure

from dpfast.plotting import COLORS, MUTED, styled
from dpfast.report.points import Point, sweep

Seed: TypeAlias = tuple[int, float]  # of a run, with its held-out accuracy
SWEEPS = {
    "oversampling": ("prune", "oversample", "candidates for each sample that is kept"),
    "omega": ("dp", "omega", "omega"),
}


def swept(points: list[Point], name: str, size: tuple[float, float]) -> Figure | None:
    """Held-out accuracy over the cost of a sample, GFLOP of generation; bars are standard
    deviations over runs.
    """
    source, field, label = SWEEPS[name]
    values = sweep(points, source, field)
    if not values:
        return None
    figure = Figure(figsize=(size[0], 1.35 * size[1]), layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    styled(top, "", "held-out accuracy, %")
    styled(bottom, label, "GFLOP a sample")
    for value, group in values.items():
        accuracies = [100 * p.accuracy for p in group]
        spread = stdev(accuracies) if len(group) > 1 else 0.0
        top.errorbar(
            value, mean(accuracies), spread, fmt="o", color=COLORS[source], ms=5, capsize=3, lw=1.2
        )
    means = [100 * mean(p.accuracy for p in group) for group in values.values()]
    top.plot(list(values), means, color=COLORS[source], lw=1.3, alpha=0.6)
    costs = {
        v: [p.flops / p.samples / 1e9 for p in group if p.flops] for v, group in values.items()
    }
    known = {v: mean(cost) for v, cost in costs.items() if cost}
    bottom.plot(list(known), list(known.values()), "o-", color=MUTED, ms=4, lw=1.3)
    bottom.set_ylim(bottom=0)
    bottom.set_xticks(list(values), [f"{v:g}" for v in values])
    return figure


def measured_sweeps(points: list[Point]) -> list[tuple[str, str, str, dict[float, list[Seed]]]]:
    """(source, field, label of the axis, {value: (seed, accuracy) of each run}) of ``SWEEPS``."""
    return [
        (source, field, label, {value: _seeds(group) for value, group in values.items()})
        for source, field, label in SWEEPS.values()
        for values in [sweep(points, source, field)]
    ]


def _seeds(group: list[Point]) -> list[Seed]:
    return [(point.fields["seed"], point.accuracy) for point in group]
