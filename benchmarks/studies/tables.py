"""What the study's runs say, as Markdown: accuracy against samples, omega, oversampling, patience,
and seconds.

    dpfast bench study --tables

Accuracies are means over seeds on the held-out real images, with the standard deviation of a single
run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.studies import options as study_options
from benchmarks.studies.settings import COMMON, OPTIONS, setting
from dpfast.textfiles import read_json_lines

Line = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """The runs of one setting over seeds. accuracies: of each seed, in [0, 1]; seconds: mean
    (``seconds``).
    """

    accuracies: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        return mean(self.accuracies)

    def __str__(self) -> str:
        spread = f" ± {100 * stdev(self.accuracies):.2f}" if len(self.accuracies) > 1 else ""
        return f"{100 * self.mean:.2f}{spread}"


def read(path: Path) -> list[Line]:
    return [line for _, line in read_json_lines(path)]


def seconds(
    lines: Iterable[Line], kind: Callable[[Line], Any] | None = None
) -> Callable[[Line], float]:
    """A run's seconds of generation and training at the best rates that any of ``lines`` of the
    same kind had.

    kind: of a line, those whose samples cost the same; None: as the study's options say. Runs
    share a machine with other work, so that their own seconds vary; their counts do not.
    """
    kind = kind or _kind
    made: dict[Any, float] = {}
    step = float("inf")
    for line in lines:
        rate = line["generation_seconds"] / line["samples_made"]
        made[kind(line)] = min(rate, made.get(kind(line), rate))
        step = min(step, line["training_seconds"] / line["iterations"])
    return lambda line: made[kind(line)] * line["samples_made"] + step * line["iterations"]


def _kind(line: Line) -> tuple[Any, ...]:
    """Runs whose samples cost the same: omega 0 skips the guidance, an option has a price of its
    own.
    """
    guided = line["source"] == "dp" and line["fields"]["omega"] != 0
    return (
        line["source"],
        guided,
        *(f"{line['fields'].get(name)}" for option in OPTIONS for name in option),
    )


def cells(
    lines: list[Line], key: Callable[[Line], Any], duration: Callable[[Line], float]
) -> dict[Any, Cell]:
    """``key`` of a line -> its runs."""
    groups = defaultdict(list)
    for line in lines:
        groups[key(line)].append(line)
    return {
        name: Cell(tuple(line["test_accuracy"] for line in group), mean(map(duration, group)))
        for name, group in groups.items()
    }


def scaling(lines: list[Line]) -> dict[tuple[str, int], Cell]:
    """(source, samples) -> the runs of the common setting."""
    full = max(line["iterations"] for line in lines)
    usual = [line for line in lines if _setting(line) == COMMON and line["iterations"] == full]
    return cells(
        usual, lambda line: (line["source"], line["fields"]["maximum_samples"]), seconds(lines)
    )


def sweep(lines: list[Line], source: str, field: str) -> dict[Any, Cell]:
    """Value of ``field`` -> runs of ``source`` at the middle size that differ from the common
    setting in nothing else.

    A field that the common setting leaves to the recipe has the value "recipe" there.
    """
    sizes = sorted({line["fields"]["maximum_samples"] for line in lines})
    full = max(line["iterations"] for line in lines)
    same = [
        line
        for line in lines
        if line["source"] == source
        and line["iterations"] == full
        and line["fields"]["maximum_samples"] == sizes[len(sizes) // 2]
        and _setting(line) | {field: None} == COMMON | {field: None}
    ]
    return dict(
        sorted(
            cells(same, lambda line: _setting(line).get(field, "recipe"), seconds(lines)).items()
        )
    )


def cheapest(lines: list[Line], target: float) -> dict[str, tuple[int, int, float, Cell]]:
    """Source -> (samples, iterations, omega, runs) of the least seconds among those that reach
    ``target`` on average.

    Of all sizes, lengths and omegas that ran in an otherwise common setting.
    """
    found: dict[str, tuple[int, int, float, Cell]] = {}
    usual = [line for line in lines if _setting(line) | {"omega": None} == COMMON | {"omega": None}]

    def key(line: Line) -> tuple[str, int, int, float]:
        fields = line["fields"]
        return line["source"], fields["maximum_samples"], line["iterations"], fields["omega"]

    for (source, *rest), cell in cells(usual, key, seconds(lines)).items():
        if cell.mean >= target and (
            source not in found or cell.seconds < found[source][-1].seconds
        ):
            found[source] = *rest, cell
    return found


def tables(path: Path) -> Iterator[str]:
    """The lines of the Markdown tables."""
    lines = read(path)
    grid = scaling(lines)
    sources = [
        s for s in ("static", "dynamic", "prune", "dp") if any(name == s for name, _ in grid)
    ]
    sizes = sorted({size for _, size in grid})
    yield from table(
        ["samples", *sources],
        ([f"{n:,}", *(str(grid.get((s, n), "")) for s in sources)] for n in sizes),
    )
    best = max((cell.mean, size) for (source, size), cell in grid.items() if source == "static")
    yield (
        f"Best static accuracy: {100 * best[0]:.2f} % with {best[1]:,} samples. The fewest "
        "samples that reach it:"
    )
    for source in sources[1:]:
        enough = [
            size for size in sizes if (source, size) in grid and grid[source, size].mean >= best[0]
        ]
        fewest = "none of these sizes"
        if enough:
            fewest = f"{enough[0]:,}, {best[1] / enough[0]:.1f}x fewer"
        yield f"{source}: {fewest}."
    for title, source, field in SWEEPS:
        rows = sweep(lines, source, field)
        if len(rows) > 1:
            yield from table(
                [title, "accuracy", "seconds"],
                ([str(v), str(c), f"{c.seconds:.0f}"] for v, c in rows.items()),
            )
    options = list(study_options.rows(lines))
    if options:
        yield from table(study_options.HEAD, options)
    largest = grid["static", max(size for source, size in grid if source == "static")]
    yield (
        f"The least seconds to the {100 * largest.mean:.2f} % of static's largest set "
        f"({largest.seconds:.0f} s):"
    )
    yield from table(
        ["source", "samples", "iterations", "omega", "accuracy", "seconds"],
        (
            [
                source,
                f"{n:,}",
                str(steps),
                f"{omega:g}" if source == "dp" else "",
                str(cell),
                f"{cell.seconds:.0f}",
            ]
            for source, (n, steps, omega, cell) in cheapest(lines, largest.mean).items()
        ),
    )


SWEEPS = (
    ("dp, omega", "dp", "omega"),
    ("prune, oversampling", "prune", "oversample"),
    ("dp, patience", "dp", "patience_growth"),
)


def _setting(line: Line) -> Line:
    return setting(line["fields"])


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield ""
    for cells_ in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cells_) + " |"
    yield ""
