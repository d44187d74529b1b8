"""Guided samples as they were measured beside selected ones of the theory: their label noise, and
what it leads to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dpfast.errors import InputError
from dpfast.plotting import COLORS, INK, MUTED, styled
from dpfast.theory.label_noise import (
    Directions,
    Shares,
    directions,
    hardness,
    kept,
    matched,
    shares,
)
from dpfast.theory.theorem import test_error


class GuidedCell(NamedTuple):
    """The measurements of samples of one form of guidance. kappa: of an anchor, 0 without;
    gains: measured accuracies of runs over those of unguided ones, in points.
    """

    omega: float
    kappa: float
    found: Shares
    gains: Sequence[float] = ()


class LabelNoise(NamedTuple):
    """A cell beside the theory. label_wrong: what selection alone leads to where the selector is
    wrong as often; accuracy: of a test, predicted with the labels that were measured and with
    ``label_wrong``, both in [0, 1].
    """

    cell: GuidedCell
    label_wrong: float
    accuracy: float
    accuracy_of_selection: float


def _tilted_accuracy(at: Directions, power: float) -> float:
    """Returns the accuracy with 2,048 kept samples of 512 features; the penalty is that of a kept
    sample.
    """
    keep = kept(power)
    error = test_error(
        d=512,
        n=2048 / keep,
        keep=keep,
        ridge=1e-3 * keep,
        strategy="soft",
        power=power,
        **at._asdict(),
    )
    return 1 - float(error)


def beside_theory(cells: Sequence[GuidedCell]) -> list[LabelNoise]:
    """Returns measured cells beside a selection along directions that have the shares of the
    unguided one.

    Raises ``InputError`` where none is unguided.
    """
    at = _unguided(cells)
    made = []
    for cell in cells:
        wrong = cell.found.selector_wrong
        power = hardness(at, wrong)
        as_measured, improvement = matched(at, cell.found.label_wrong, wrong)
        made.append(
            LabelNoise(
                cell,
                shares(at, power).label_wrong,
                _tilted_accuracy(at.improved(improvement), as_measured),
                _tilted_accuracy(at, power),
            )
        )
    return made


def _unguided(cells: Sequence[GuidedCell]) -> Directions:
    found = [cell.found for cell in cells if cell.omega == 0]
    if not found:
        raise InputError("guidance: no cell with omega = 0, which gives the directions")
    return directions(found[0])


def label_noise(beside: Sequence[LabelNoise], pruned: Sequence[tuple[float, float]] = ()) -> Figure:
    """Returns labels of guided samples against how often the learner gets them wrong, measured and
    as selection would leave them; and the accuracies that the theory predicts for both, above those
    that were measured, where they were.

    pruned: the first two shares of selected samples, as measured: wrong for the learner, and
    denied.
    """
    cells = [made.cell for made in beside]
    figure = Figure(figsize=(11, 4.3), layout="constrained", facecolor="white")
    known = any(cell.gains for cell in cells)
    labels, predicted, *measured = figure.subplots(1, 2 + known)
    x_label = "samples that the learner gets wrong, %"
    styled(labels, x_label, "labels that the judge denies, %")
    at = _unguided(cells)
    line = np.array([shares(at, power) for power in np.expm1(np.linspace(0, 9, 60))])
    labels.plot(100 * line[:, 1], 100 * line[:, 0], color=MUTED, label="theory: selection alone")
    if pruned:
        points = 100 * np.array(pruned)
        style = {"color": MUTED, "marker": "x", "linestyle": "", "ms": 6}
        labels.plot(points[:, 0], points[:, 1], label="hardest unguided ones", **style)
    styled(predicted, "omega", "predicted gain, points")
    for axes in measured:
        styled(axes, "omega", "measured gain, points")
    start = next(made.accuracy for made in beside if made.cell.omega == 0)
    kappas = sorted({cell.kappa for cell in cells if cell.omega})
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.4, 1, len(kappas)))
    for kappa, shade in zip(kappas, shades, strict=True):
        color = shade if kappa else COLORS["static"]
        own = sorted(
            (m for m in beside if m.cell.kappa == kappa or not m.cell.omega),
            key=lambda made: made.cell.omega,
        )
        name = f"kappa {kappa:g}" if kappa else "the paper's"
        omegas = [made.cell.omega for made in own]
        wrong, denied = (
            [100 * getattr(made.cell.found, field) for made in own]
            for field in ("selector_wrong", "label_wrong")
        )
        labels.plot(wrong, denied, "o-", ms=4, lw=1.2, color=color, label=name)
        gained = [100 * (made.accuracy - start) for made in own]
        predicted.plot(omegas, gained, "o-", ms=4, lw=1.2, color=color, label=name)
        ran = [made.cell for made in own if made.cell.gains]
        spread = [
            np.std(c.gains, ddof=1) / np.sqrt(len(c.gains)) if len(c.gains) > 1 else 0.0
            for c in ran
        ]
        means = [float(np.mean(cell.gains)) for cell in ran]
        for axes in measured:
            axes.errorbar(
                [cell.omega for cell in ran],
                means,
                spread,
                fmt="o-",
                ms=4,
                lw=1.2,
                capsize=2,
                color=color,
            )
    handles, _ = labels.get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    for axes in (predicted, *measured):
        axes.axhline(0, color=MUTED, lw=0.8, zorder=0)
        axes.set_xlim(left=0)
    text = "Gains over no guidance. Theory: d = 512, 2,048 kept, ridge 0.001 a kept sample."
    figure.suptitle(text, color=INK, fontsize=10, x=0.01, ha="left")
    return figure
