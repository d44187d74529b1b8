"""Power laws of the error against samples, and how many times fewer samples reach an accuracy.

    error = a samples^-b

is fitted to every group of runs by least squares of the logarithms (Figs. 1 and 4 of
arXiv 2502.15588). Intervals are of 95 %, from a bootstrap over seeds: all runs of a seed are drawn
together, in all groups at once, so that what runs of one seed share stays paired. Few seeds make a
bootstrap too sure of itself, its percentiles above all; so what it gives is a standard error,
times sqrt(k / (k - 1)) of k seeds, and the interval is as wide as Student's t with k - 1 degrees of
freedom says. With as many runs of each seed that is the t-interval of the mean over seeds.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpfast.errors import InputError
from dpfast.report.points import IDENTITY, SIZE, Point
from dpfast.report.runs import ORDER

DRAWS = 2000  # of the bootstrap
SIZES = 3  # that a law is fitted from
# Student's t, the quantile of 97.5 %, of 1 to 30 degrees of freedom
T = np.array(
    [
        "12.706",
        "4.303",
        "3.182",
        "2.776",
        "2.571",
        "2.447",
        "2.365",
        "2.306",
        "2.262",
        "2.228",
        "2.201",
        "2.179",
        "2.160",
        "2.145",
        "2.131",
        "2.120",
        "2.110",
        "2.101",
        "2.093",
        "2.086",
        "2.080",
        "2.074",
        "2.069",
        "2.064",
        "2.060",
        "2.056",
        "2.052",
        "2.048",
        "2.045",
        "2.042",
    ],
    dtype=float,
)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number and the ends of its interval of 95 %; None without one, for a reason in words."""

    value: float
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def text(self, digits: int) -> str:
        """Returns the number and its interval, or why there is none."""
        return f"{_number(self.value, digits)} ({self.ends(digits) or self.missing})"

    def ends(self, digits: int) -> str:
        """Returns the interval in words; "" without one."""
        if self.low is None or self.high is None:
            return ""
        return f"{_number(self.low, digits)} to {_number(self.high, digits)}"

    @property
    def missing(self) -> str:
        """The reason why there is no interval; "" with one."""
        return f"no interval: {self.reason}" if self.reason else ""


def _number(value: float, digits: int) -> str:
    return "over 10^9" if value > 1e9 else f"{value:,.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Law:
    """A group of runs and the power law of its errors.

    factor, exponent: a and b of error = a samples^-b; None without a law. reason: why there is
    none. notes: what a reader has to know of the points, in words.
    """

    name: str
    source: str
    points: tuple[Point, ...]
    factor: float | None = None
    exponent: Interval | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def sizes(self) -> list[int]:
        return sorted({point.samples for point in self.points})

    @property
    def seeds(self) -> list[Any]:
        return _seeds(self.points)

    def error(self, samples: np.ndarray) -> np.ndarray:
        """Returns the law's error with so many samples."""
        assert self.factor is not None
        assert self.exponent is not None
        return np.asarray(self.factor * samples**-self.exponent.value)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The factor by which fewer samples a group needs than ``base`` has at its largest size, for
    the mean accuracy that was measured there.

    samples: that the group's law needs; inside: whether it has runs on both sides of that.
    """

    group: Law
    base: Law
    accuracy: float
    size: int
    samples: Interval
    factor: Interval
    inside: bool

    def sentence(self) -> str:
        beyond = "" if self.inside else "; beyond the sizes that it was measured at"
        return (
            f"{self.group.name} needs {self.factor.text(1)} times fewer samples than "
            f"{self.base.name} for its {self.accuracy:.2%} with {self.size:,}{beyond}"
        )


def groups_of(
    points: Sequence[Point], group_by: Sequence[str] | None = None
) -> dict[str, list[Point]]:
    """Maps names to the points of a group: of one source, and equal in the fields ``group_by``;
    None: in all fields but sizes and seed, of which a name says those that are not as in most runs.

    Raises ``InputError`` for a field that no point has.
    """
    fields = {key for point in points for key in point.fields}
    for field in group_by or ():
        if field not in fields | {"source"}:
            raise InputError(
                f"group_by = {field!r}: no run has such a field; expected source or one of "
                f"{', '.join(sorted(fields))}"
            )
    by = sorted(fields - IDENTITY - SIZE) if group_by is None else list(dict.fromkeys(group_by))
    usual = {}
    if group_by is None:
        counts = {name: Counter(_value(point, name) for point in points) for name in by}
        usual = {name: count.most_common(1)[0][0] for name, count in counts.items()}
    found: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        values = {name: _value(point, name) for name in by if name != "source"}
        said = [f"{name} {text}" for name, text in values.items() if usual.get(name) != text]
        found[", ".join([point.source, *said])].append(point)

    def place(name: str) -> tuple[int, int, str]:
        source = found[name][0].source
        order = ORDER.index(source) if source in ORDER else len(ORDER)
        return order, -len(found[name]), name

    return {name: found[name] for name in sorted(found, key=place)}


def fit_laws(
    points: Sequence[Point], group_by: Sequence[str] | None = None, *, draws: int = DRAWS
) -> list[Law]:
    """Returns the laws of all groups (``groups_of``), also of those that have none."""
    groups = groups_of(points, group_by)
    weights = _Weights(points, draws)
    return [_law(name, group, weights) for name, group in groups.items()]


def savings(laws: Sequence[Law], *, base: str = "static", draws: int = DRAWS) -> list[Saving]:
    """Returns the savings of the groups with a law against the largest group of the source
    ``base``; [] without one.
    """
    bases = [law for law in laws if law.source == base]
    if not bases:
        return []
    against = max(bases, key=lambda law: len(law.points))
    size = against.sizes[-1]
    top = [point for point in against.points if point.samples == size]
    found = []
    for law in laws:
        if law.source == base or law.exponent is None or law.exponent.value <= 0:
            continue
        weights = _Weights([*law.points, *top], draws)
        reached = _mean_error(top, weights)
        if not reached[0] > 0:
            continue
        a, b = _fits(_fitted(law.points), weights)
        logs = _ratio(a - np.log(reached), b, min(len(_seeds(top)), len(law.seeds)))
        samples, factor = _exp(logs), _exp(_less(math.log(size), logs))
        inside = law.sizes[0] <= samples.value <= law.sizes[-1]
        found.append(
            Saving(
                group=law,
                base=against,
                accuracy=1 - float(reached[0]),
                size=size,
                samples=samples,
                factor=factor,
                inside=inside,
            )
        )
    return found


class _Weights:
    """The draws of each seed, (1 + draws, seeds): the first row is the data as they are."""

    def __init__(self, points: Sequence[Point], draws: int) -> None:
        self.place = {seed: place for place, seed in enumerate(_seeds(points))}
        count = len(self.place)
        drawn = np.ones((1, count))
        if count > 1:
            chances = np.full(count, 1 / count)
            counts = np.random.default_rng(0).multinomial(count, chances, draws)
            drawn = np.concatenate([drawn, counts])
        self.drawn = drawn

    def of(self, points: Sequence[Point]) -> np.ndarray:
        """Returns (1 + draws, n) weights of points; one without a known seed is always there
        once.
        """
        columns = [
            self.drawn[:, self.place[seed]] if seed is not None else np.ones(len(self.drawn))
            for seed in (point.seed for point in points)
        ]
        return np.stack(columns, 1)


def _law(name: str, points: Sequence[Point], weights: _Weights) -> Law:
    notes = []
    used = _fitted(points)
    if len(used) < len(points):
        notes.append(
            f"{len(points) - len(used)} of {len(points)} runs have no error above 0, and are not "
            "in the fit"
        )
    mixed = sorted(
        field
        for field in {key for point in points for key in point.fields} - IDENTITY - SIZE
        if len({_value(point, field) for point in points}) > 1
    )
    if mixed:
        notes.append(f"its runs differ in {', '.join(mixed)}")
    law = Law(name=name, source=points[0].source, points=tuple(points), notes=tuple(notes))
    sizes = len({point.samples for point in used})
    if sizes < SIZES:
        return replace(law, reason=f"runs of {sizes} of the {SIZES} sizes that it needs")
    a, b = _fits(used, weights)
    exponent = _interval(b, len(_seeds(used)))
    if exponent.value <= 0:
        law = replace(law, notes=(*notes, "its error does not fall"))
    return replace(law, factor=float(np.exp(a[0])), exponent=exponent)


def _fitted(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.accuracy) and p.accuracy < 1 and p.samples > 0]


def _fits(points: Sequence[Point], weights: _Weights) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ln a, b), (1 + draws,) each, of every draw; NaN where it has too few sizes."""
    x = np.log([point.samples for point in points])
    y = np.log([1 - point.accuracy for point in points])
    w = weights.of(points)
    _, size = np.unique(x, return_inverse=True)
    drawn = np.stack([w[:, size == each].sum(1) > 0 for each in range(size.max() + 1)], 1)
    total = w.sum(1)
    with np.errstate(all="ignore"):
        mean_x, mean_y = w @ x / total, w @ y / total
        off_x, off_y = x - mean_x[:, None], y - mean_y[:, None]
        slope = (w * off_x * off_y).sum(1) / (w * off_x**2).sum(1)
    slope[drawn.sum(1) < SIZES] = np.nan
    return mean_y - slope * mean_x, -slope


def _mean_error(points: Sequence[Point], weights: _Weights) -> np.ndarray:
    w = weights.of(points)
    with np.errstate(all="ignore"):
        return np.asarray(w @ np.array([1 - point.accuracy for point in points]) / w.sum(1))


def _interval(values: np.ndarray, seeds: int) -> Interval:
    """Returns the interval of the data's value, the first, and the others of the draws."""
    value, drawn = float(values[0]), values[1:]
    reason = _unknown(drawn, seeds)
    if reason:
        return Interval(value=value, reason=reason)
    half = student_t(seeds) * math.sqrt(float(np.nanvar(drawn)) * seeds / (seeds - 1))
    return Interval(value=value, low=value - half, high=value + half)


def _ratio(above: np.ndarray, below: np.ndarray, seeds: int) -> Interval:
    """Returns the ratio of two such values. Its interval holds every x at which ``above - x below``
    may be 0 (Fieller 1954), and is bounded only where ``below`` is not 0.
    """
    u, b = float(above[0]), float(below[0])
    reason = _unknown(above[1:] + below[1:], seeds)
    if reason:
        return Interval(value=u / b, reason=reason)
    known = np.isfinite(above[1:] + below[1:])
    spread = (
        np.cov(above[1:][known], below[1:][known]) * student_t(seeds) ** 2 * seeds / (seeds - 1)
    )
    square, linear, rest = b * b - spread[1, 1], u * b - spread[0, 1], u * u - spread[0, 0]
    if square <= 0:
        return Interval(value=u / b, reason="its exponent may be 0")
    root = math.sqrt(max(linear * linear - square * rest, 0.0))
    return Interval(value=u / b, low=(linear - root) / square, high=(linear + root) / square)


def _unknown(drawn: np.ndarray, seeds: int) -> str:
    """Returns the reason why there is no interval; "" where there is one."""
    if seeds < 2:
        return "one seed" if seeds else "no known seed"
    enough = np.isfinite(drawn).mean() >= 0.9
    return "" if enough else "too few sizes have runs of several seeds"


def student_t(values: int) -> float:
    """Returns Student's t for the interval of 95 % of a mean over so many values, two or more: the
    quantile of 97.5 % with ``values`` - 1 degrees of freedom, to three decimals.
    """
    return float(T[values - 2]) if values - 2 < len(T) else 1.96 + 2.5 / (values - 1)


def _less(whole: float, part: Interval) -> Interval:
    """Returns ``whole`` less a part."""
    if part.low is None or part.high is None:
        return Interval(value=whole - part.value, reason=part.reason)
    return Interval(value=whole - part.value, low=whole - part.high, high=whole - part.low)


def _exp(logs: Interval) -> Interval:
    """Returns the numbers of which these are the logarithms."""
    with np.errstate(over="ignore"):
        value, low, high = (
            None if each is None else float(np.exp(each))
            for each in (logs.value, logs.low, logs.high)
        )
    assert value is not None
    return Interval(value=value, low=low, high=high, reason=logs.reason)


def _seeds(points: Sequence[Point]) -> list[Any]:
    seeds = {point.seed for point in points} - {None}
    return sorted(seeds)


def _value(point: Point, field: str) -> str:
    if field not in point.fields:
        return "not recorded"
    value = point.fields[field]
    return value if isinstance(value, str) else json.dumps(value)
