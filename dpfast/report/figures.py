"""The figures of a report: one function each, from runs to a matplotlib figure with direct
labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure

from dpfast.plotting import COLORS, INK, MUTED, axes_of, label_ends
from dpfast.report.laws import Law
from dpfast.report.runs import Run

STYLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))  # of the groups of a source


def _color(source: str) -> str:
    return COLORS.get(source, MUTED)


def curve(
    runs: list[Run], size: tuple[float, float], key: str, label: str, scale: float = 1.0
) -> Figure | None:
    """Draws a measure of the evaluations against iterations, one line a run; a vertical line at
    each addition (Fig. 2).
    """
    figure, axes = axes_of(size, "optimiser iterations", label)
    ends: dict[str, tuple[str, float, float, str]] = {}
    heights: list[float] = []
    for run in runs:
        for source in run.sources:
            rows = [m for m in run.events("evaluation", source) if key in m]
            if not rows:
                continue
            steps, values = [m["step"] for m in rows], [scale * m[key] for m in rows]
            axes.plot(
                steps, values, color=_color(source), lw=1.5, alpha=0.9 if len(runs) == 1 else 0.65
            )
            heights += values
            ends[source] = (source, steps[-1], values[-1], _color(source))
            for m in run.events("addition", source):
                axes.axvline(
                    m["step"], color=_color(source), lw=0.8, ls=(0, (4, 3)), alpha=0.45, zorder=0
                )
    if not heights:
        return None
    # the climb of the first iterations would hide the rest
    spread = np.quantile(heights, [0.06, 0.94])
    room = 0.25 * (spread[1] - spread[0]) + 1e-6
    axes.set_ylim(max(0.0, spread[0] - room), min(spread[1] + room, max(heights) + room))
    label_ends(axes, list(ends.values()))
    return figure


def accuracy(runs: list[Run], size: tuple[float, float]) -> Figure | None:
    return curve(runs, size, "accuracy", "validation accuracy, %", 100)


def loss(runs: list[Run], size: tuple[float, float]) -> Figure | None:
    return curve(runs, size, "loss", "training loss, nats")


def scaling(laws: Sequence[Law], size: tuple[float, float], label: str) -> Figure | None:
    """Draws accuracy against samples with fitted power laws (Figs. 1 and 4). Groups without one are
    small open marks where others have one, and name their source where no line does. label: of the
    accuracy.
    """
    points = [point for law in laws for point in law.points]
    if not points:
        return None
    figure, axes = axes_of(size, "samples", f"{label} accuracy, %")
    fitted = [law for law in laws if law.exponent is not None]
    ends = []
    seen: Counter[str] = Counter()
    for law in fitted or laws:
        color, style = _color(law.source), STYLES[seen[law.source] % len(STYLES)]
        seen[law.source] += 1
        samples = np.array([p.samples for p in law.points], float)
        top1 = np.array([p.accuracy for p in law.points])
        # one name a source at the ends of lines, the others' in a legend
        first = seen[law.source] == 1
        name = None if first else law.name
        axes.plot(samples, 100 * top1, style[0], color=color, ms=5, alpha=0.8, label=name)
        if law.exponent is not None:
            line = np.geomspace(samples.min(), samples.max(), 60)
            axes.plot(line, 100 * (1 - law.error(line)), color=color, lw=1.5, ls=style[1])
        height = 100 * top1[samples == samples.max()].mean()
        if first:
            ends.append((law.name, samples.max(), height, color))
    for law in laws if fitted else ():
        if law.exponent is None:
            if not seen[law.source]:  # none of its source has a line
                last = max(law.points, key=lambda point: point.samples)
                at = [p.accuracy for p in law.points if p.samples == last.samples]
                height = 100 * float(np.mean(at))
                ends.append((law.source, float(last.samples), height, _color(law.source)))
                seen[law.source] += 1
            axes.plot(
                [p.samples for p in law.points],
                [100 * p.accuracy for p in law.points],
                "o",
                mec=_color(law.source),
                mfc="none",
                ms=4,
                alpha=0.7,
            )
    if len({p.samples for p in points}) > 3:
        axes.set_xscale("log")
        low, high = (p(point.samples for point in points) for p in (min, max))
        doubled = (low * 2**i for i in range(0, 40, 1 if size[0] > 5 else 2))
        ticks = [round(tick, 1 - len(str(tick))) for tick in doubled if tick <= 1.1 * high]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
    label_ends(axes, ends)
    if any(count > 1 for count in seen.values()):
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def phases(runs: list[Run], size: tuple[float, float]) -> Figure | None:
    """Draws the seconds of generation, training and evaluation by source, the mean of the runs."""
    sources = list(dict.fromkeys(s for run in runs for s in run.sources))
    parts = {
        "generation": ("generation", "seconds", 1.0),
        "training": ("training", "seconds", 0.45),
        "evaluation": ("training", "evaluation_seconds", 0.2),
    }
    means = {
        s: [float(np.mean([r.total(e, k, s) or 0 for r in runs])) for e, k, _ in parts.values()]
        for s in sources
    }
    if not np.any(list(means.values())):
        return None
    figure, axes = axes_of((size[0], 0.9 + 0.5 * len(sources)), "seconds, mean of the runs", "")
    axes.grid(False)
    longest = max(map(sum, means.values()))
    for place, source in enumerate(reversed(sources)):
        left = 0.0
        for (name, (*_, depth)), width in zip(parts.items(), means[source], strict=True):
            axes.barh(place, width, left=left, color=_color(source), alpha=depth, height=0.6)
            text = f"{name} {width:.0f} s" if size[0] > 5 else f"{width:.0f} s"
            if width > 0.012 * len(text) * longest * (7 / size[0]):  # room for the words
                color = "white" if depth == 1 else INK
                axes.text(
                    left + width / 2, place, text, ha="center", va="center", fontsize=8, color=color
                )
            left += width
    axes.set_yticks(range(len(sources)), list(reversed(sources)))
    return figure


def hardness(runs: list[Run], size: tuple[float, float]) -> Figure | None:
    """Draws the entropy of new samples at birth beside that of unguided ones under the same
    learner, by round.
    """
    figure, axes = axes_of(size, "round", "mean entropy, nats")
    drawn = False
    for run in runs:
        rows = [m for m in run.events("addition", "dp") if "unguided_entropy" in m]
        for key, color in (("entropy", COLORS["dp"]), ("unguided_entropy", MUTED)):
            axes.plot(
                [m["round"] for m in rows],
                [m[key] for m in rows],
                "o-",
                color=color,
                ms=4,
                lw=1.3,
                alpha=0.7,
            )
        if rows:
            drawn = True
            for key, name, color in (
                ("entropy", "guided", COLORS["dp"]),
                ("unguided_entropy", "unguided", MUTED),
            ):
                if run is runs[0]:
                    place = (rows[0]["round"], rows[0][key])
                    axes.annotate(
                        name,
                        place,
                        xytext=(0, 8),
                        textcoords="offset points",
                        color=color,
                        weight="bold",
                    )
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure if drawn else None


PER_RUN: dict[str, tuple[Callable[[list[Run], tuple[float, float]], Figure | None], str]] = {
    "accuracy_iterations": (
        accuracy,
        "Accuracy on real validation images. Dashed: samples were added.",
    ),
    "loss_iterations": (loss, "Training loss. It rises when harder samples arrive."),
    "hardness": (
        hardness,
        "Entropy of new samples at birth, beside unguided samples under the same learner.",
    ),
    "phases": (phases, "Where the time goes: generation, training, evaluation from dark to light."),
}
