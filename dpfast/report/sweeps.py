"""Fig. 5 of the paper: accuracy and cost against oversampling and against omega."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from matplotlib.figure import Figure

from dpfast.errors import InputError
from dpfast.plotting import COLORS, MUTED, styled
from dpfast.report.points import Point, points_of_study, sweep
from dpfast.textfiles import (
    COUNT,
    FLAG,
    NUMBER,
    SHARE,
    WHOLE,
    Kind,
    check_table,
    read_json_lines,
    rows_of,
)

Seed: TypeAlias = tuple[int, float]  # of a run, with its held-out accuracy
# omega, kappa; shares of wrong labels, wrong learner and a wrong learner before a right label;
# gains over static in points
Cell: TypeAlias = tuple[float, float, tuple[float, float, float], list[float]]
MEAN = Kind(  # with its standard error
    lambda value: isinstance(value, list) and len(value) == 2 and SHARE.holds(value[0]),
    "a share, 0 to 1, and its error",
)
CELL = {
    "omega": NUMBER,
    "kappa": NUMBER,
    "cfg_scale": NUMBER,
    "projected": FLAG,
    "samples": COUNT,
    "agreement": rows_of(MEAN, 1),
    "wrong": MEAN,
    "right_of_wrong": rows_of(MEAN.or_null(), 1),
}
HARDEST = Kind(
    lambda row: isinstance(row, dict) and all(SHARE.holds(row.get(n)) for n in ("wrong", "denied")),
    "a table with the shares wrong and denied",
)
SWEEPS = {
    "oversampling": ("prune", "oversample", "candidates for each sample that is kept"),
    "omega": ("dp", "omega", "omega"),
}


def swept(points: list[Point], name: str, size: tuple[float, float]) -> Figure | None:
    """Draws held-out accuracy over the cost of a sample, GFLOP of generation; bars are standard
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
    """Returns (source, field, label of the axis, {value: (seed, accuracy) of each run}) of
    ``SWEEPS``.
    """
    return [
        (source, field, label, {value: _seeds(group) for value, group in values.items()})
        for source, field, label in SWEEPS.values()
        for values in [sweep(points, source, field)]
    ]


def _seeds(group: list[Point]) -> list[Seed]:
    return [(point.fields["seed"], point.accuracy) for point in group]


def measured_cells(guidance: Path, study: Path | None = None) -> list[Cell]:
    """Returns the forms of guidance at the usual scale of classifier-free guidance, of the records
    of ``dpfast bench guidance``; labels are judged by the first judge. The unguided one comes
    first.

    study: the records of ``dpfast bench anchored``, whose runs have gains over the static run of
    the same seed and size, at the one size that most static runs have.

    Raises ``InputError`` for a file that is not there or cannot be read, and with its line for a
    value that is missing or of another kind.
    """
    gains: dict[tuple[float, float], list[float]] = defaultdict(list)
    points = [] if study is None else points_of_study(study)
    static = {_twin(p, study): p.accuracy for p in points if p.source == "static"}
    size = Counter(samples for _, samples, _ in static).most_common(1)
    static = {twin: accuracy for twin, accuracy in static.items() if twin[1] == size[0][0]}
    for point in points:
        other = ("cfg_scale_rounds", "anchor_schedule")
        usual = not any(map(point.fields.get, other)) and "add_at" in point.fields
        if point.source == "dp" and usual and _twin(point, study) in static:
            check_table(point.fields, f"{study}, {point.run}, fields", {"omega": NUMBER})
            key = (float(point.fields["omega"]), float(point.fields.get("anchor") or 0))
            gains[key].append(100 * (point.accuracy - static[_twin(point, study)]))
    cells: dict[tuple[float, float], dict[str, Any]] = {}
    lines = _lines(guidance, CELL)
    scale = next((line["cfg_scale"] for line in lines if line["omega"] == 0), None)
    for line in lines:
        plain = not (line["projected"] or line.get("late"))
        if line["cfg_scale"] == (scale or line["cfg_scale"]) and plain:
            key = (line["omega"], line["kappa"] if line["omega"] else 0.0)
            if key not in cells or line["samples"] >= cells[key]["samples"]:
                cells[key] = line
    return [
        (*key, _shares(cells[key]), gains[key])
        for key in sorted(cells, key=lambda key: (key[0] > 0, key[1], key[0]))
    ]


def measured_pruning(guidance: Path) -> list[tuple[float, float]]:
    """Returns the shares of the hardest unguided samples of ``dpfast bench evidence`` that the
    learner gets wrong and whose labels the judge denies; [] of other records. Raises ``InputError``
    as ``measured_cells`` does.
    """
    lines = _lines(guidance, {}, {"hardest": rows_of(HARDEST)})
    return [(row["wrong"], row["denied"]) for line in lines for row in line.get("hardest", ())]


def _lines(
    guidance: Path, kinds: Mapping[str, Kind], known: Mapping[str, Kind] | None = None
) -> list[dict[str, Any]]:
    """Returns the lines of a file of records, checked."""
    try:
        numbered = list(read_json_lines(guidance))
    except FileNotFoundError:
        raise InputError(f"guidance = {str(guidance)!r}: no such file") from None
    for number, line in numbered:
        check_table(line, f"{guidance}, line {number}", kinds, known)
    return [line for _, line in numbered]


def _shares(line: dict[str, Any]) -> tuple[float, float, float]:
    wrong, of_wrong = line["wrong"][0], line["right_of_wrong"][0]
    return 1 - line["agreement"][0][0], wrong, wrong * (of_wrong[0] if of_wrong else 0.0)


def _twin(point: Point, study: Path | None) -> tuple[int, int, int]:
    """Returns the key that a run of a study shares with the static one that it is held against."""
    fields = point.fields
    wanted = dict.fromkeys(("seed", "maximum_samples", "iterations"), WHOLE)
    check_table(fields, f"{study}, {point.run}, fields", wanted)
    return fields["seed"], fields["maximum_samples"], fields["iterations"]
