"""``report``: runs -> one self-contained HTML page and its figures as PNG files."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from dpfast.config import RecipeError
from dpfast.report.figures import PER_RUN, scaling
from dpfast.report.runs import Run, differences, read_runs
from dpfast.report.sheets import enlarged, tile

WIDE, NARROW = (7.0, 3.6), (3.7, 2.9)  # inches; a phone gets a figure drawn for its width
SHEET_COLUMNS = 12

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1f2328;--muted:#5c6470;--line:#e2e5e9;--card:#fff}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e6e8eb;--muted:#a3abb6;--line:#30363d;--card:#f4f5f6}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1rem 4rem}h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.2rem;margin:2.8rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}.sub,figcaption,.note{color:var(--muted)}.lead{font-size:1.2rem;max-width:42rem}
figure{margin:1.4rem 0}figure img{max-width:100%;height:auto;background:var(--card);border-radius:6px;display:block}
figcaption{font-size:.9rem;margin-top:.4rem}.scroll{overflow-x:auto}code{overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:100%;font-size:.92rem}
th,td{padding:.4rem .8rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}thead th{color:var(--muted);font-weight:600}
"""


def write_report(paths: Sequence[Path], out: Path, *, study: Path | None = None) -> Path:
    """Writes ``index.html`` and PNG files into ``out`` and returns the page's path.

    Args:
        paths: run folders, finished or not; one report holds runs on the same real images.
        out: a folder, made where it does not exist.
        study: a JSON-lines file with "source", "samples", "seed" and "test_accuracy" in each line.

    Raises ``RecipeError`` for a path that is no run, runs on different real images, or a study that cannot be read.
    """
    runs = read_runs(list(paths))
    points = _study(study) if study is not None else _points(runs)
    out.mkdir(parents=True, exist_ok=True)
    body = [_head(runs, points), _table(runs), _notes(runs)]
    body.append("<h2>Training</h2>")
    for name, (draw, caption) in PER_RUN.items():
        body.append(_figure(out / f"{name}.png", draw(runs, WIDE), draw(runs, NARROW), caption))
    body.append("<h2>Accuracy against samples</h2>")
    caption = "Held-out accuracy; points are runs, lines power laws of the error, fitted from three sizes on."
    body.append(_figure(out / "accuracy_samples.png", scaling(points, WIDE), scaling(points, NARROW), caption))
    body += [_sets(runs), _sheets(runs, out), _recipe(runs)]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = out / "index.html"
    page.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Deliberate Practice</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    return page


def _points(runs: Iterable[Run]) -> list[dict[str, Any]]:
    rows = [m for run in runs for m in run.events("result") if "test_accuracy" in m]
    return [{"source": m["source"], "samples": m["samples"], "accuracy": m["test_accuracy"]} for m in rows]


def _study(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        return [{"source": r["source"], "samples": r["samples"], "accuracy": r["test_accuracy"]} for r in rows]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise RecipeError(f"study = {str(path)!r}: cannot be read: {error!r}") from None


def _head(runs: list[Run], points: list[dict[str, Any]]) -> str:
    names = ", ".join(html.escape(run.path.name) for run in runs)
    means = {s: np.mean([p["accuracy"] for p in points if p["source"] == s]) for s in {p["source"] for p in points}}
    lead = ""
    if {"dp", "static"} <= set(means) and not differences(runs):
        gap = 100 * (means["dp"] - means["static"])
        lead = (
            f'<p class="lead">dp is {abs(gap):.1f} points {"above" if gap >= 0 else "below"} static on held-out images.'
        )
        lead += f" Mean over all points: {means['dp']:.1%} and {means['static']:.1%}.</p>"
    return f'<h1>Deliberate Practice</h1><p class="sub">{len(runs)} run(s): {names}</p>{lead}'


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>'


def _table(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        for source in run.sources:
            for m in run.events("result", source)[-1:] or [{}]:
                percent = [f"{m[k]:.2%}" if k in m else "-" for k in ("validation_accuracy", "test_accuracy")]
                time = [f"{run.seconds(e, source):.0f} s" for e in ("generation", "training")]
                counts = [str(m.get("samples", "-")), str(m.get("step", "-")), str(m.get("additions", "-"))]
                rows.append([run.path.name, source, *counts, *percent, *time])
    header = ("run", "source", "samples", "iterations", "additions", "validation", "held-out", "generation", "training")
    return "<h2>Results</h2>" + _html_table(header, rows)


def _notes(runs: list[Run]) -> str:
    notes = [note for run in runs for note in run.notes]
    for key, values in differences(runs).items():
        notes.append(f"The recipes differ in {key}: {', '.join(json.dumps(v) for v in values)}")
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _sets(runs: list[Run]) -> str:
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
    return "<h2>Other evaluation sets</h2>" + _html_table(header, rows) if rows else ""


def _sheets(runs: list[Run], out: Path) -> str:
    """Contact sheets of every round, entropy at birth rising to the right; needs a saved pool."""
    from dpfast.pool.export import import_pool

    parts = []
    for run in runs:
        try:
            pool, _ = import_pool(run.path)
        except RecipeError:
            parts.append(f'<p class="note">{html.escape(run.path.name)}: no saved samples, so no contact sheets.</p>')
            continue
        rounds, entropy, labels = (pool.column(name) for name in ("round", "entropy", "label"))
        for number in rounds.unique().tolist():
            rows = []
            for label in labels.unique().tolist()[:10]:
                members = torch.nonzero((rounds == number) & (labels == label)).flatten()[:SHEET_COLUMNS]
                if len(members):
                    rows.append(pool.images(members[entropy[members].argsort()]))
            if rows:
                picture = enlarged(tile(rows), rows[0].shape[-1])
                path = out / f"samples_{run.path.name}_round_{number:02d}.png"
                picture.save(path)
                caption = f"{run.path.name}, round {number}: a row per class, entropy at birth rises to the right."
                parts.append(_img(path.read_bytes(), None, caption))
    return "<h2>Samples</h2>" + "".join(parts)


def _recipe(runs: list[Run]) -> str:
    text = html.escape(json.dumps(runs[0].recipe, indent=2))
    return f'<h2>Recipe of {html.escape(runs[0].path.name)}</h2><div class="scroll"><pre>{text}</pre></div>'


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    return data.getvalue()


def _figure(path: Path, wide: Figure | None, narrow: Figure | None, caption: str) -> str:
    if wide is None or narrow is None:
        return f'<p class="note">Nothing to draw: {html.escape(caption)}</p>'
    data = _png(wide)
    path.write_bytes(data)
    return _img(data, _png(narrow), caption)


def _img(wide: bytes, narrow: bytes | None, caption: str) -> str:
    text = html.escape(caption)
    image = f'<img src="{_uri(wide)}" alt="{text}">'
    small = f'<source media="(max-width:600px)" srcset="{_uri(narrow)}">' if narrow is not None else ""
    return f"<figure><picture>{small}{image}</picture><figcaption>{text}</figcaption></figure>"


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
