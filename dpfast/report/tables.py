"""The tables of a report as HTML: results, time and throughput, further evaluation sets."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from dpfast.evaluate.measures import SHOTS
from dpfast.pool.memory_tiers import readable
from dpfast.report.laws import SIZES, Law, Saving
from dpfast.report.metrics import shots_text
from dpfast.report.runs import Run
from dpfast.terminal import table, width


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table as HTML; a last column without a name is for words, which wrap."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    kind = "" if header[-1] else ' class="noted"'
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
    )


def results(runs: list[Run]) -> str:
    """Returns the accuracy of each source of each run."""
    return "<h2>Results</h2>" + html_table(*_results(runs))


def results_text(runs: list[Run]) -> str:
    """Returns the same table for a terminal."""
    header, rows = _results(runs)
    return table([header, *rows], left=(0, 1), rule=True, columns=width())


def _results(runs: list[Run]) -> tuple[tuple[str, ...], list[list[str]]]:
    rows = []
    for run in runs:
        for source in run.sources:
            m: dict[str, Any] = (run.events("result", source)[-1:] or [{}])[0]
            percent = [
                f"{m[k]:.2%}" if k in m else "-" for k in ("validation_accuracy", "test_accuracy")
            ]
            counts = [
                str(m.get("samples", "-")),
                str(m.get("step", "-")),
                str(m.get("additions", "-")),
            ]
            rows.append([run.path.name, source, *counts, *percent])
    header = ("run", "source", "samples", "iterations", "additions", "validation", "held-out")
    return header, rows


def shots(runs: list[Run]) -> str:
    """Returns held-out accuracy by the shots of a class; empty where no run has class counts."""
    rows = []
    for run in runs:
        for m in (m for source in run.sources for m in run.events("result", source)[-1:]):
            found = [m.get(f"test_{name}") for name in SHOTS]
            if any(value is not None for value in found):
                of = [m.get(f"{name}_classes") for name in SHOTS]
                rows.append([run.path.name, m["source"], *map(shots_text, found, of)])
    if not rows:
        return ""
    head = ("run", "source", *SHOTS.values())
    note = (
        '<p class="note">Held-out accuracy, the mean over classes, by the count of a class in '
        "class_counts.</p>"
    )
    return f"<h3>By shots</h3>{html_table(head, rows)}{note}"


def laws(laws: Sequence[Law], saved: Sequence[Saving]) -> str:
    """Returns the exponents of all groups, those with a law first, and what they save."""
    rows = []
    for law in sorted(laws, key=lambda law: law.exponent is None):
        sizes, exponent = law.sizes, law.exponent
        notes = [law.reason, "" if exponent is None else exponent.missing, *law.notes]
        span = f"{len(sizes)}: {sizes[0]:,} to {sizes[-1]:,}" if len(sizes) > 1 else f"{sizes[0]:,}"
        rows.append(
            (
                law.name,
                "-" if exponent is None else f"{exponent.value:.3f}",
                "-" if exponent is None else exponent.ends(3) or "-",
                str(len(law.points)),
                span,
                str(len(law.seeds) or "-"),
                "; ".join(filter(None, notes)),
            )
        )
    if not rows:
        return ""
    head = ("group", "exponent", "95 % over seeds", "runs", "sizes", "seeds", "")
    title = "<h3>Power laws, error = a / samples<sup>exponent</sup></h3>"
    return f"{title}{html_table(head, rows)}{_saved(saved)}"


def _saved(saved: Sequence[Saving]) -> str:
    if not saved:
        return ""
    base, size, accuracy = saved[0].base.name, saved[0].size, saved[0].accuracy
    rows = []
    for each in saved:
        beyond = "" if each.inside else "beyond the sizes that it was measured at"
        rows.append(
            (
                each.group.name,
                _number(each.factor.value, "", 1),
                each.factor.ends(1) or "-",
                _number(each.samples.value, ""),
                "; ".join(filter(None, (each.factor.missing, beyond))),
            )
        )
    head = ("group", "times fewer samples", "95 % over seeds", "samples", "")
    title = f"Samples for {accuracy:.2%}, the mean of {base} with {size:,}"
    return f"<h3>{html.escape(title)}</h3>{html_table(head, rows)}"


def sentences(laws: Sequence[Law], saved: Sequence[Saving]) -> list[str]:
    """Returns the sentences of ``laws`` for a terminal. Where all runs together have too few sizes
    nobody asked for a law, so that none is missed.
    """
    asked = len({size for law in laws for size in law.sizes}) >= SIZES
    found = [
        f"{law.name}: exponent {law.exponent.text(3)}, {len(law.points)} runs of "
        f"{len(law.sizes)} sizes"
        if law.exponent is not None
        else f"{law.name}: no power law, {law.reason}"
        for law in laws
        if asked or law.exponent is not None
    ]
    return [*found, *(each.sentence() for each in saved)]


def phases(runs: list[Run]) -> str:
    """Returns seconds of each phase and what they brought. Of an unfinished source the training is
    not known yet.
    """
    rows = []
    for run in runs:
        for source in run.sources:
            made, forwards = (run.total("generation", key, source) for key in ("made", "forwards"))
            generation, training = (
                run.total(event, "seconds", source) for event in ("generation", "training")
            )
            steps, evaluation, waited = (
                run.total("training", key, source)
                for key in ("steps_per_second", "evaluation_seconds", "loader_wait")
            )
            rows.append(
                [
                    run.path.name,
                    source,
                    _number(generation, " s"),
                    _number(made and generation and made / generation, "", 1),
                    _number(made and forwards and forwards / made, "", 1),
                    _share(run.share("generation", source)),
                    _number(training, " s"),
                    _number(steps, "", 1),
                    _share(run.share("interval", source)),
                    _number(evaluation, " s"),
                    "-" if waited is None else f"{waited:.2%}",
                    _memory(run.highest("memory_peak", source)),
                    *(
                        _number(run.total("generation", key, source), "")
                        for key in ("skipped", "retries")
                    ),
                ]
            )
    return "<h2>Time and throughput</h2>" + html_table(
        (
            "run",
            "source",
            "generation",
            "samples/s",
            "denoiser forwards a sample",
            "of the peak",
            "training",
            "steps/s",
            "of the peak",
            "evaluation",
            "loader wait",
            "memory peak",
            "skipped gradients",
            "out-of-memory retries",
        ),
        rows,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _memory(count: float | None) -> str:
    return "-" if count is None else readable(count)


def _number(value: float | None, unit: str, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def sets(runs: list[Run]) -> str:
    rows = [
        [
            run.path.name,
            m["source"],
            m["name"] + (f" {m['severity']}" if m.get("severity") else ""),
            str(m["images"]),
            f"{m['top1']:.2%}",
            f"{m['top5']:.2%}",
            f"{m['calibration_error']:.3f}",
            f"{m['entropy']:.3f}",
        ]
        for run in runs
        for m in run.events("set")
    ]
    header = ("run", "source", "set", "images", "top-1", "top-5", "calibration error", "entropy")
    return "<h2>Other evaluation sets</h2>" + html_table(header, rows) if rows else ""
