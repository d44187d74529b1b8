"""The page of a table: the paper's numbers beside those measured."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from dpfast.files import listed
from dpfast.paper.definition import Entry, Table
from dpfast.paper.runs import PaperRun
from dpfast.report import tables
from dpfast.report.figures import scaling
from dpfast.report.laws import fit_laws, savings
from dpfast.report.page import ACCURACIES, SWEPT, figure_html, page_html, picture_html
from dpfast.report.points import on_validation, points_of_runs
from dpfast.report.sweeps import swept

RESULTS = {"validation": "validation_accuracy", "held-out": "test_accuracy"}  # keys of a result


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the comparison for one measure; accuracies in per cent, None where there is none.

    measured: of each seed that is finished. why: what is missing, in words.
    """

    entry: Entry
    samples: tuple[int, ...]
    paper: float | None
    measured: tuple[float, ...]
    why: str

    @property
    def mean(self) -> float | None:
        return mean(self.measured) if self.measured else None

    @property
    def difference(self) -> float | None:
        """The measured accuracy minus paper, in points."""
        if self.mean is None or self.paper is None:
            return None
        return self.mean - self.paper


def comparison(table: Table, runs: Sequence[PaperRun], measure: str) -> list[Line]:
    """Returns a line for each row of the table, those without a run among them."""
    return [
        _line(entry, [run for run in runs if run.entry.name == entry.name], measure)
        for entry in table.entries
    ]


def write_page(table: Table, runs: Sequence[PaperRun], out: Path) -> Path:
    """Writes ``index.html`` and its figures into ``out``, and returns the page's path."""
    body = [f"<h1>{html.escape(table.title)}</h1>"]
    ready = [run for run in runs if run.finished]
    counted = f"{table.name}: {len(ready)} of {len(runs)} runs are finished"
    body.append(f'<p class="sub">{html.escape(counted)}</p>')
    for text in filter(None, (table.about, table.says and f"The paper: {table.says}")):
        body.append(f'<p class="note">{html.escape(text)}</p>')
    for measure in table.measures:
        body += [f"<h2>Accuracy in %: {html.escape(measure)}</h2>", _compared(table, runs, measure)]
    body += _figures(table, ready, out)
    body += ["<h2>Runs</h2>", _runs(runs)] if runs else []
    for command in table.commands:
        pictures = listed(out / command.makes, "*.png")
        state = f"finished, {out / command.makes}" if pictures else "missing"
        body.append(f'<p class="note">{html.escape(f"{command.name}: {state}")}</p>')
        body += [picture_html(path, f"{command.name}: {path.name}") for path in pictures]
    page = out / "index.html"
    page.write_text(
        page_html("".join(body), title=table.title), encoding="utf-8", errors="backslashreplace"
    )
    return page


def _line(entry: Entry, runs: Sequence[PaperRun], measure: str) -> Line:
    samples, measured, lacking = list[int](), list[float](), dict[str, list[int]]()
    for run in runs:
        result = run.result if run.finished else None
        if result is None:
            lacking.setdefault(run.out_of_reach() or run.state, []).append(run.seed)
            continue
        samples.append(int(result["samples"]))
        found = _measured(run, result, measure)
        if found is None:
            why = f"missing: {measure} was not measured, --evaluation names its folder"
            lacking.setdefault(why, []).append(run.seed)
        else:
            measured.append(100 * found)
    reasons = [f"stays out: {entry.left_out}"] if entry.left_out else []
    for why, seeds in lacking.items():
        some = f"seed {', '.join(map(str, seeds))}: " if len(seeds) < len(runs) else ""
        reasons.append(some + why)
    return Line(
        entry=entry,
        samples=tuple(samples),
        paper=entry.paper.get(measure),
        measured=tuple(measured),
        why="; ".join(filter(None, (*reasons, entry.note))),
    )


def _measured(run: PaperRun, result: dict[str, object], measure: str) -> float | None:
    if measure in RESULTS:
        value = result.get(RESULTS[measure])
    else:
        read = run.read()
        sets = [] if read is None else read.events("set", run.recipe.practice.sources[-1])
        value = next((each["top1"] for each in sets if each["name"] == measure), None)
    return float(value) if isinstance(value, (int, float)) else None


def _compared(table: Table, runs: Sequence[PaperRun], measure: str) -> str:
    compared = comparison(table, runs, measure)
    base = next((line for line in compared if line.entry.name == table.baseline), None)
    printed = any(line.paper is not None for line in compared)  # of a plot nothing is
    columns: dict[str, Callable[[Line], str]] = {
        "run": lambda line: line.entry.name,
        "row": lambda line: line.entry.row or "-",
        "samples": lambda line: _range(line.samples),
    }
    if printed:
        columns["paper"] = lambda line: _percent(line.paper)
    columns["measured"] = lambda line: (
        "stays out" if line.entry.left_out else _spread(line.measured)
    )
    if printed:
        columns["difference"] = lambda line: _points(line.difference)
    if base is not None and printed:
        columns["paper's gain"] = lambda line: _gain(line.paper, base.paper)
    if base is not None:
        columns["gain"] = lambda line: _gain(line.mean, base.mean)
    rows = [[cell(line) for cell in columns.values()] for line in compared]
    notes = dict[str, list[str]]()
    for line in compared:
        if line.why:
            notes.setdefault(line.why, []).append(line.entry.name)
    told = [f"{', '.join(names)}: {why}" for why, names in notes.items()]
    if base is not None:
        told.insert(0, f"Gains are over {table.baseline}, in points.")
    below = "".join(f'<p class="note">{html.escape(text)}</p>' for text in told)
    return tables.html_table(list(columns), rows) + below


def _figures(table: Table, runs: Sequence[PaperRun], out: Path) -> list[str]:
    """Returns accuracy against samples with power laws, and sweeps, as far as there are runs for
    them.
    """
    read = [found for run in runs if (found := run.read()) is not None]
    points = points_of_runs(read)
    known, _ = on_validation(points)
    parts = []
    if len({point.samples for point in known}) > 1:
        laws = fit_laws(known, ("source", *table.group_by))
        caption = "Validation accuracy; points are runs, lines power laws of the error."
        draw = partial(scaling, laws, label=ACCURACIES["validation"])
        parts.append(figure_html(out / "accuracy_samples.png", draw, caption))
        parts.append(tables.laws(laws, savings(laws)))
    for name, caption in SWEPT.items():
        draw = partial(swept, points, name)
        if draw((7.0, 3.6)) is not None:
            parts.append(figure_html(out / f"{name}.png", draw, caption))
    return ["<h2>Accuracy against samples, and cost</h2>", *parts] if parts else []


def _runs(runs: Sequence[PaperRun]) -> str:
    rows = []
    for run in runs:
        read = run.read()
        parts = (
            (
                [read.total(event, "seconds", source) for source in read.sources]
                for event in ("generation", "training")
            )
            if read is not None
            else ([], [])
        )
        seconds = [sum(filter(None, part)) for part in parts]
        shown = [f"{value:.0f} s" if value else "-" for value in seconds]
        rows.append([run.name, run.state, *shown, run.command])
    return tables.html_table(("run", "state", "generation", "training", ""), rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "missing"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _gain(value: float | None, base: float | None) -> str:
    return "-" if value is None or base is None else _points(value - base)


def _range(samples: Sequence[int]) -> str:
    ends = dict.fromkeys((min(samples), max(samples))) if samples else {}
    return " to ".join(f"{each:,}" for each in ends) or "-"
