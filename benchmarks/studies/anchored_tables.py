"""What the study of anchored guidance says, as Markdown.

    dpfast bench anchored --tables --figure docs/images/anchored.png

Accuracies are percents on the held-out real images, means over seeds with their standard error.
Differences are paired by seed, with the 95 % interval of Student's t; what one arm needs for the
accuracy of another is interpolated in the logarithm of its samples or FLOPs, with the 95 % interval
of a bootstrap over seeds.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from benchmarks.studies.tables import seconds, table
from dpfast.plotting import COLORS, MUTED, axes_of, label_ends
from dpfast.report.laws import student_t
from dpfast.textfiles import COUNT, NUMBER, SHARE, TABLE, TEXT, WHOLE, Kind

Line = dict[str, Any]
Values = dict[int, float]  # by seed
KINDS = (
    "static",
    "dp",
    "cfg",
    "anchored",
    "late",
    "found",
    "prune",
)
LINE: dict[str, Kind] = {  # of a finished run, as far as it is read
    **dict.fromkeys(("part", "arm"), TEXT),
    "kind": Kind(lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    **dict.fromkeys(("size", "samples"), COUNT),
    "seed": WHOLE,
    "iterations": COUNT,
    **dict.fromkeys(("validation_accuracy", "test_accuracy", "calibration_error"), SHARE),
    **dict.fromkeys(("flops", "training_flops", "samples_made"), NUMBER),
    **dict.fromkeys(("generation_seconds", "training_seconds"), NUMBER),
    "shifts": Kind(
        lambda value: isinstance(value, dict) and all(map(SHARE.holds, value.values())),
        "a table of shares, 0 to 1",
    ),
    "fields": TABLE,
}
PAIRS = (
    ("anchored", "dp"),
    ("late", "dp"),
    ("found", "dp"),
    ("late", "found"),
    ("late", "anchored"),
    ("late", "cfg"),
    ("anchored", "cfg"),
    ("cfg", "dp"),
    ("anchored", "prune"),
    ("anchored", "static"),
    ("dp", "static"),
)
DRAWS = 2000  # of the bootstrap
DRAWN = {  # kinds of a figure, their names and colours
    "static": ("static", COLORS["static"]),
    "prune": ("prune", COLORS["prune"]),
    "dp": ("dp", COLORS["dp"]),
    "anchored": ("anchored", COLORS["dynamic"]),
    "late": ("anchored late", COLORS["real"]),
}
COSTS: dict[str, Callable[[Line], float]] = {
    "samples": lambda line: float(line["samples"]),
    "FLOPs of generation": lambda line: float(line["flops"]),
    "FLOPs in all": lambda line: float(line["flops"] + line["training_flops"]),
}


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent values and its 95 % interval by Student's t; of one value alone the
    interval has no ends.
    """
    middle = mean(values)
    if len(values) < 2:
        return middle, -math.inf, math.inf
    half = student_t(len(values)) * stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


def paired(first: Values, second: Values) -> list[float]:
    """first - second of every seed that has both."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def crossing(points: Iterable[tuple[float, float]], target: float) -> float:
    """Where rising x of (x, accuracy) points first reach ``target``, interpolated in log x: the
    first x where they begin above it, infinity where they do not reach it.
    """
    points = sorted(points)
    if points and points[0][1] >= target:
        return points[0][0]
    for (low, below), (high, above) in pairwise(points):
        if below < target <= above:
            return low * (high / low) ** ((target - below) / (above - below))
    return math.inf


def needed(
    goal: Values, curve: Mapping[float, Values], *, draws: int = DRAWS
) -> tuple[float, float, float]:
    """The x at which the mean of a curve reaches the mean of ``goal``, and the 95 % interval of a
    bootstrap over seeds, drawn for the goal and all points of the curve alike.

    curve: x -> accuracies by seed. Draws in which the goal or a point has no seed are drawn again.
    """
    chance = random.Random(0)
    seeds = sorted({*goal, *(seed for values in curve.values() for seed in values)})

    def at(drawn: Sequence[int]) -> float | None:
        picked = [[values[s] for s in drawn if s in values] for values in (goal, *curve.values())]
        if not all(picked):
            return None
        target, *means = map(mean, picked)
        return crossing(zip(curve, means, strict=True), target)

    middle = at(seeds)
    assert middle is not None
    found: list[float] = []
    while len(found) < draws:
        value = at(chance.choices(seeds, k=len(seeds)))
        if value is not None:
            found.append(value)
    found.sort()
    return middle, found[round(0.025 * (draws - 1))], found[round(0.975 * (draws - 1))]


def of_seeds(lines: Iterable[Line]) -> list[Line]:
    """The lines, the last one of each seed of an arm of one part and size."""
    names = ("part", "kind", "arm", "size", "seed")
    return list({tuple(line[name] for name in names): line for line in lines}.values())


def anchored_tables(
    lines: Sequence[Line],
    best: Mapping[str, Mapping[str, str | None]],
    missing: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """The lines of all tables. best: part -> kind -> the arm that it compares, in the selection
    the one that it chose; None where it has not; missing: the kinds of the runs of each part that
    are known and have no line.
    """
    lines = of_seeds(lines)
    chosen = best["selection"]
    yield from _selection([line for line in lines if line["part"] == "selection"], chosen)
    for part, compared in best.items():
        here = [
            line for line in lines if line["part"] == part and line["arm"] == compared[line["kind"]]
        ]
        if part == "selection" or not here:
            continue
        yield f"{part.capitalize()}: held-out accuracy of the arms."
        yield from _arms(here)
        differences = list(_differences(here))
        if differences:
            named = {line["kind"]: line["arm"] for line in here if line["kind"] != line["arm"]}
            told = "; ".join(f"{kind} is {arm}" for kind, arm in named.items())
            yield f"{part.capitalize()}: differences of the same seeds, in points. Here {told}."
            head = ["samples", "difference", "seeds", "mean", "95 % interval", "better in"]
            yield from table(head, differences)
        if part != "patience":
            rows = list(_needs(here))
            if rows:
                yield "What one needs for the other's mean accuracy, 95 % interval in brackets."
                head = ["", "accuracy", "it has", "the other needs", "times as many"]
                yield from table(head, rows)
    yield from _unrun(chosen, missing)


def figure(lines: Iterable[Line], best: Mapping[str, str | None]) -> Figure:
    """Held-out accuracy of the confirmation's arms over their samples, where several seeds ran;
    bars are standard errors.
    """
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for line in of_seeds(lines):
        if line["part"] == "confirmation" and line["arm"] == best[line["kind"]]:
            found[line["size"], line["kind"]].append(100 * line["test_accuracy"])
    drawn, axes = axes_of((7, 4.2), "samples", "held-out accuracy, %")
    axes.set_xscale("log", base=2)
    ends: list[tuple[str, float, float, str]] = []
    for kind, (name, color) in DRAWN.items():
        own = {size: values for (size, each), values in sorted(found.items()) if each == kind}
        own = {size: values for size, values in own.items() if len(values) > 1}
        if not own:
            continue
        means = [mean(values) for values in own.values()]
        errors = [stdev(values) / math.sqrt(len(values)) for values in own.values()]
        axes.errorbar(list(own), means, errors, fmt="o-", ms=4, lw=1.6, capsize=2, color=color)
        ends.append((name, max(own), means[-1], color))
    sizes = sorted({size for size, _ in found})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], color=MUTED)
    axes.minorticks_off()
    label_ends(axes, ends)
    axes.set_xlim(right=2.2 * max(sizes, default=1))  # room for names, on this scale
    return drawn


def _unrun(best: Mapping[str, str | None], missing: Mapping[str, Sequence[str]]) -> Iterator[str]:
    unknown = [kind for kind, arm in best.items() if arm is None]
    if unknown:
        yield f"The selection has not chosen yet: {', '.join(unknown)}."
    for part, kinds in missing.items():
        told = ", ".join(f"{count} of {kind}" for kind, count in Counter(kinds).items())
        yield f"Not run yet, of what is known of the {part}: {told or 'nothing'}."


def _selection(lines: Sequence[Line], best: Mapping[str, str | None]) -> Iterator[str]:
    """Every arm's accuracies; those of the validation choose."""
    groups = _groups(lines, lambda line: (line["kind"], line["arm"]))
    if not groups:
        return
    yield "Selection: by the validation accuracy."
    rows = [
        [
            _label(kind, arm),
            str(len(group)),
            _spread([line["validation_accuracy"] for line in group]),
            _spread([line["test_accuracy"] for line in group]),
            f"{mean(line['flops'] for line in group) / 1e12:.2f}",
            "chosen" if best[kind] == arm else "",
        ]
        for (kind, arm), group in groups.items()
    ]
    head = ["arm", "seeds", "validation", "held-out", "TFLOPs of generation", ""]
    yield from table(head, rows)


def _arms(lines: Sequence[Line]) -> Iterator[str]:
    duration = seconds(lines, lambda line: (line["kind"], line["arm"]))
    rows = []
    groups = _groups(lines, lambda line: (line["size"], line["kind"], line["arm"]))
    for (size, kind, arm), group in sorted(groups.items(), key=lambda item: item[0][0]):
        rows.append(
            [
                f"{size:,}",
                _label(kind, arm),
                str(len(group)),
                _spread([line["test_accuracy"] for line in group]),
                _spread([mean(line["shifts"].values()) for line in group if line["shifts"]]),
                _spread([line["calibration_error"] for line in group]),
                f"{mean(line['samples'] for line in group):,.0f}",
                f"{mean(line['flops'] for line in group) / 1e12:.2f}",
                f"{mean(map(duration, group)):.0f}",
            ]
        )
    head = ["samples", "arm", "seeds", "held-out", "shifts", "calibration error", "at the end"]
    yield from table([*head, "TFLOPs of generation", "seconds"], rows)


def _differences(lines: Sequence[Line]) -> Iterator[list[str]]:
    """Those of each size, and where there are several those of a seed's mean over "all"."""
    found = _by_seed(lines, "test_accuracy")
    sizes = sorted({size for size, _ in found})
    rows = {f"{size:,}": {kind: found.get((size, kind), {}) for kind in KINDS} for size in sizes}
    if len(sizes) > 1:
        rows["all"] = {kind: _over_sizes(found, kind, sizes) for kind in KINDS}
    for size, by_kind in rows.items():
        for first, second in PAIRS:
            values = paired(by_kind[first], by_kind[second])
            if values:
                middle, low, high = interval([100 * value for value in values])
                wins = sum(value > 0 for value in values)
                yield [
                    size,
                    f"{first} - {second}",
                    str(len(values)),
                    f"{middle:+.2f}",
                    f"{low:+.2f} to {high:+.2f}" if len(values) > 1 else "",
                    f"{wins} of {len(values)}",
                ]


def _over_sizes(found: Mapping[tuple[int, str], Values], kind: str, sizes: Sequence[int]) -> Values:
    """The mean over sizes of a kind, of the seeds that all of them have."""
    values = [found.get((size, kind), {}) for size in sizes]
    seeds = set.intersection(*(set(each) for each in values))
    return {seed: mean(each[seed] for each in values) for seed in seeds}


def _needs(lines: Sequence[Line]) -> Iterator[list[str]]:
    """What plain dp needs for the accuracy of anchored ones of every size, and those for plain
    dp's best.
    """
    found = _by_seed(lines, "test_accuracy")
    sizes = {kind: [size for size, name in sorted(found) if name == kind] for kind in KINDS}
    kinds = ("anchored", "late", "found")
    goals = [(kind, size, "dp") for kind in kinds for size in sizes[kind]]
    if sizes["dp"]:
        top = max(sizes["dp"], key=lambda size: mean(found[size, "dp"].values()))
        goals += [("dp", top, kind) for kind in kinds]
    for kind, size, other in goals:
        if len(sizes[other]) < 2:
            continue
        for cost, of in COSTS.items():
            costs = {
                each: mean(
                    of(line) for line in lines if (line["size"], line["kind"]) == (each, other)
                )
                for each in sizes[other]
            }
            curve = {costs[each]: found[each, other] for each in sizes[other]}
            has = mean(of(line) for line in lines if (line["size"], line["kind"]) == (size, kind))
            values = needed(found[size, kind], curve)
            most = max(curve)
            middle, low, high = (_cost(value, most) for value in values)
            times = [_times(value / has, most / has) for value in values]
            yield [
                f"{cost}: {other} for {kind} with {size:,}",
                f"{100 * mean(found[size, kind].values()):.2f}",
                _cost(has, math.inf),
                f"{middle} [{low}, {high}]",
                f"{times[0]} [{times[1]}, {times[2]}]",
            ]


def _cost(value: float, most: float) -> str:
    if math.isinf(value):
        return f"> {_cost(most, math.inf)}"
    return f"{value:,.0f}" if value < 1e9 else f"{value / 1e12:.2f} T"


def _times(value: float, most: float) -> str:
    return f"> {most:.2f}" if math.isinf(value) else f"{value:.2f}"


def _by_seed(lines: Iterable[Line], name: str) -> dict[tuple[int, str], Values]:
    """(size, kind) -> a number of its lines by seed."""
    found: dict[tuple[int, str], Values] = defaultdict(dict)
    for line in lines:
        found[line["size"], line["kind"]][line["seed"]] = line[name]
    return found


def _groups(lines: Iterable[Line], key: Callable[[Line], Any]) -> dict[Any, list[Line]]:
    groups: dict[Any, list[Line]] = defaultdict(list)
    for line in lines:
        groups[key(line)].append(line)
    return groups


def _label(kind: str, arm: str) -> str:
    return kind if arm == kind else f"{kind}, {arm}"


def _spread(values: Sequence[float]) -> str:
    """A mean in percent with its standard error; nothing of no values."""
    if not values:
        return ""
    error = f" ± {100 * stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.2f}{error}"
