"""What the cells of ``dpfast bench guidance`` say: tables, also at equal entropy, and a figure.

Means with their standard errors. All cells have the same labels and noise, so that differences
between cells are known better than the errors say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dpfast.errors import InputError
from dpfast.plotting import MUTED, styled
from dpfast.textfiles import COUNT, FLAG, NUMBER, TEXT, Kind, rows_of

Line = dict[str, Any]
Value = tuple[float, float]  # with its standard error
MEAN = Kind(  # with its standard error
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(NUMBER.holds, value)),
    "a mean and its error",
)
KINDS = {  # of a line
    **dict.fromkeys(("cell", "form", "learner"), TEXT),
    **dict.fromkeys(("omega", "kappa", "cfg_scale", "seconds"), NUMBER),
    "projected": FLAG,
    "samples": COUNT,
    **dict.fromkeys(("entropy", "alike", "wrong", "useful"), MEAN),
    "agreement": rows_of(MEAN, 2),
    "right_of_wrong": rows_of(MEAN.or_null(), 3),
}
KNOWN = {"cosine": MEAN, "cosine_negative": MEAN, "late": FLAG}
LEVELS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)  # nats
JUDGES = ("judge 1, a RegNet", "judge 2, a ResNet")
UNGUIDED = "CFG 1.5, kappa 0"  # also where the curves of an anchor and of the projection begin


def latest(lines: Iterable[Line], file: Path) -> dict[str, list[Line]]:
    """Form -> its lines by omega, of each cell the one with the most samples.

    Raises ``InputError`` for a file without lines, and for one whose cells were guided by several
    learners.
    """
    best: dict[str, Line] = {}
    for line in lines:
        held = best.get(line["cell"])
        if held is None or line["samples"] >= held["samples"]:
            best[line["cell"]] = line
    learners = {line["learner"] for line in best.values()}
    if len(learners) != 1:
        found = "no lines" if not learners else f"cells of {len(learners)} learners"
        raise InputError(f"results = {str(file)!r}: {found}; expected cells of one learner")
    forms: dict[str, list[Line]] = {}
    for line in best.values():
        forms.setdefault(line["form"], []).append(line)
    start = next((line for line in forms.get(UNGUIDED, []) if line["omega"] == 0), None)
    for own in forms.values():
        if start is not None and start not in own and own[0]["cfg_scale"] == start["cfg_scale"]:
            own.append(start)
        own.sort(key=lambda line: line["omega"])
    return dict(sorted(forms.items(), key=lambda item: _order(item[1][-1])))


def _order(line: Line) -> tuple[bool, float, float, bool]:
    return line["projected"], line["cfg_scale"], line["kappa"], line.get("late", False)


def _percent(value: Value | None) -> str:
    return "" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def told(line: Line) -> str:
    """A cell in a few words."""
    first, second = (f"{_percent(value)} %" for value in line["agreement"])
    return (
        f"entropy {line['entropy'][0]:.3f} ± {line['entropy'][1]:.3f}, "
        f"judges agree {first} and {second}, {line['seconds']:.1f} s of 1,000"
    )


def at_entropy(lines: list[Line], level: float, column: str, judge: int = 0) -> Value | None:
    """A column where the curve over omega first has an entropy of ``level``, linear between its
    cells; None where it does not reach it.

    The error joins those of the column and, by the slope, of the entropy, as if they were
    independent; where both fall together with a harder sample that is more than there is.
    """
    for left, right in itertools.pairwise(lines):
        (low, low_error), (high, high_error) = left["entropy"], right["entropy"]
        if not low <= level <= high or low == high:
            continue
        part = (level - low) / (high - low)
        (a, a_error), (b, b_error) = (_column(line, column, judge) for line in (left, right))
        error = math.hypot((1 - part) * a_error, part * b_error)
        shift = math.hypot((1 - part) * low_error, part * high_error) * (b - a) / (high - low)
        return a + part * (b - a), math.hypot(error, shift)
    return None


def _column(line: Line, column: str, judge: int) -> Value:
    value = line[column][judge] if column == "agreement" else line[column]
    return value[0], value[1]


def tables(forms: dict[str, list[Line]]) -> Iterator[str]:
    """The lines of the Markdown tables."""
    own = [line for form, lines in forms.items() for line in lines if line["form"] == form]
    head = ["form", "omega", "entropy, nats", "judge 1 agrees, %", "judge 2 agrees, %"]
    head += ["judges alike, %", "learner wrong, %", "of these right: judge 1", "judge 2", "both"]
    head += ["wrong and right for both", "s of 1,000"]
    yield from _table(head, map(_row, own))
    yield "At equal entropy, linear between omegas: agreement of judge 1 / of judge 2, %"
    yield from _table(
        ["form", *(f"{level:g} nats" for level in LEVELS)],
        ([form, *(_at(lines, level) for level in LEVELS)] for form, lines in forms.items()),
    )
    yield "At equal entropy: samples that the learner gets wrong and both judges right, %"
    yield from _table(
        ["form", *(f"{level:g} nats" for level in LEVELS)],
        (
            [form, *(_percent(at_entropy(lines, level, "useful")) for level in LEVELS)]
            for form, lines in forms.items()
        ),
    )
    yield "Cosine of the gradient and the label score over guided steps: mean, share negative, %"
    yield from _table(
        ["form", "omega", "cosine", "negative, %"],
        (
            [
                line["form"],
                f"{line['omega']:g}",
                f"{line['cosine'][0]:.3f} ± {line['cosine'][1]:.3f}",
                _percent(line["cosine_negative"]),
            ]
            for line in own
            if "cosine" in line and "cosine_negative" in line
        ),
    )


def _row(line: Line) -> list[str]:
    return [
        line["form"],
        f"{line['omega']:g}",
        f"{line['entropy'][0]:.3f} ± {line['entropy'][1]:.3f}",
        *map(_percent, line["agreement"]),
        _percent(line["alike"]),
        _percent(line["wrong"]),
        *map(_percent, line["right_of_wrong"]),
        _percent(line["useful"]),
        f"{line['seconds']:.1f}",
    ]


def _at(lines: list[Line], level: float) -> str:
    values = [at_entropy(lines, level, "agreement", judge) for judge in range(len(JUDGES))]
    return "" if None in values else " / ".join(map(_percent, values))


def _table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield ""
    for cells in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cells) + " |"
    yield ""


# Okabe and Ito's colours, as of all figures
ANCHORS = {0: "#D55E00", 0.25: "#CC79A7", 0.5: "#009E73", 1: "#0072B2", 2: "#56B4E9"}
GREYS = {2: "#9ca3af", 2.5: "#6b7280", 3.5: "#374151"}  # of CFG without an anchor


def figure(forms: dict[str, list[Line]]) -> Figure:
    """Entropy against label agreement, a line for each form over omega and a panel for each
    judge; bars are standard errors.
    """
    drawn = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
    panels = drawn.subplots(1, len(JUDGES), sharey=True)
    for judge, (axes, name) in enumerate(zip(panels, JUDGES, strict=True)):
        styled(axes, "entropy of the learner, nats", "label agreement, %" if judge == 0 else "")
        axes.set_title(name, fontsize=10, color=MUTED)
        for lines in forms.values():
            line = lines[-1]
            if line["projected"]:
                style: Line = {"color": "#E69F00", "ls": ":", "label": "projected"}
            elif line["cfg_scale"] != 1.5:
                label = f"kappa 0, CFG {line['cfg_scale']:g}"
                style = {"color": GREYS.get(line["cfg_scale"], MUTED), "ls": "--", "label": label}
            else:
                kappa, late = line["kappa"], line.get("late", False)
                label = f"kappa {kappa:g}{' in the second half' if late else ''}"
                ls = "-." if late else "-"
                style = {"color": ANCHORS.get(kappa, MUTED), "ls": ls, "label": label}
            agreement = [_column(each, "agreement", judge) for each in lines]
            axes.errorbar(
                [each["entropy"][0] for each in lines],
                [100 * mean for mean, _ in agreement],
                [100 * error for _, error in agreement],
                [each["entropy"][1] for each in lines],
                marker="o",
                ms=3.5,
                lw=1.4,
                elinewidth=0.8,
                **style,
            )
    panels[-1].legend(frameon=False, fontsize=8, loc="lower left")
    return drawn
