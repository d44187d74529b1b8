"""``report``: runs -> one self-contained HTML page and its figures as PNG files."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from dpfast.errors import InputError
from dpfast.generate.from_recipe import decoder_of_run
from dpfast.pool.pool import SamplePool
from dpfast.pool.subset import Choice, choose, read_chosen
from dpfast.report import tables
from dpfast.report.figures import PER_RUN, scaling
from dpfast.report.inclusion import births, errors_around, inclusion
from dpfast.report.laws import fit_laws, savings
from dpfast.report.points import (
    Point,
    lead,
    left_out,
    on_validation,
    points_of_runs,
    points_of_study,
)
from dpfast.report.runs import Run, differences, read_runs
from dpfast.report.sheets import enlarged, reduced, tile
from dpfast.report.sweeps import swept

WIDE, NARROW = (7.0, 3.6), (3.7, 2.9)  # inches; a phone gets a figure drawn for its width
ACCURACIES = {"test": "held-out", "validation": "validation"}
# bytes of a run's samples that are held at a time: for the errors of learners, and for sheets
LOOKED, SHOWN = 3 << 29, 1 << 29
SWEPT = {
    "oversampling": "prune: accuracy and cost against "
    "how many candidates a kept sample was chosen from.",
    "omega": "dp: accuracy and cost against the strength of guidance; 0 is the timing alone.",
}

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1f2328;--muted:#5c6470;--line:#e2e5e9;--card:#fff}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e6e8eb;--muted:#a3abb6;--line:#30363d;--card:#f4f5f6}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.2rem;margin:2.8rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}.sub,figcaption,.note{color:var(--muted)}
.lead{font-size:1.2rem;max-width:42rem}
figure{margin:1.4rem 0}
figure img{max-width:100%;height:auto;background:var(--card);border-radius:6px;display:block}
figcaption{font-size:.9rem;margin-top:.4rem}.scroll{overflow-x:auto}code{overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:100%;font-size:.92rem}
th,td{padding:.4rem .8rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--muted);font-weight:600}
.noted td:first-child,.noted td:last-child{white-space:normal;min-width:8rem}
.noted td:last-child{text-align:left;min-width:13rem}
"""


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    study: Path | None = None,
    device: torch.device | str = "cpu",
    accuracy: str = "test",
    group_by: Sequence[str] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Path:
    """Writes ``index.html`` and PNG files into ``out`` and returns the page's path.

    Args:
        paths: run folders, finished or not; one report holds runs on the same real images.
        out: a folder, made where it does not exist.
        study: a JSON-lines file as of ``dpfast.report.points.points_of_study``, in place of the
        runs' own results.
        device: where learners and decoders read the samples again.
        accuracy: "test" or "validation", of which power laws are fitted.
        group_by: fields of the recipe by which the runs of a source are told apart there; None: all
        but sizes and seed.
        tell: called with the table of results, then in words with what it says, each exponent and
        factor, and each run that is not in the fits.

    Raises ``InputError`` where no path is a run, for runs on different real images, a study that
    cannot be read, or a field that no run has.
    """
    if accuracy not in ACCURACIES:
        raise InputError(f"accuracy = {accuracy!r}: expected one of {', '.join(ACCURACIES)}")
    runs, refused = read_runs(list(paths))
    points = points_of_study(study) if study is not None else points_of_runs(runs)
    scaled, missing = (points, []) if accuracy == "test" else on_validation(points)
    missing = [*refused, *(left_out(runs) if study is None else []), *missing]
    laws = fit_laws(scaled, group_by)
    saved = savings(laws)
    out.mkdir(parents=True, exist_ok=True)

    def figure(
        name: str, draw: Callable[[tuple[float, float]], Figure | None], caption: str
    ) -> str:
        return figure_html(out / f"{name}.png", draw, caption)

    body = [_head(runs, points), tables.results(runs), tables.shots(runs), _notes(runs, refused)]
    body.append("<h2>Training</h2>")
    body += [
        figure(name, partial(draw, runs), caption) for name, (draw, caption) in PER_RUN.items()
    ]
    body.append(tables.phases(runs))
    body.append("<h2>Accuracy against samples</h2>")
    label = ACCURACIES[accuracy]
    caption = (
        f"{label.capitalize()} accuracy; points are runs, lines power laws of the error, fitted "
        "from three sizes on."
    )
    body.append(figure("accuracy_samples", partial(scaling, laws, label=label), caption))
    body.append(tables.laws(laws, saved))
    for text in missing:
        body.append(f'<p class="note">Not in these fits: {html.escape(text)}</p>')
    tell(tables.results_text(runs))
    told = [lead(points), *tables.sentences(laws, saved)]
    for text in (*filter(None, told), *(f"not in the fits: {text}" for text in missing)):
        tell(text)
    body.append("<h2>Accuracy and cost</h2>")
    for name, caption in SWEPT.items():
        body.append(figure(name, partial(swept, points, name), caption))
    body.append(tables.sets(runs))
    body.append("<h2>Samples</h2>")
    for run in runs:
        body.append(_samples(run, figure, out, device))
    body.append(_recipe(runs))
    page = out / "index.html"
    page.write_text(
        page_html("".join(body), title="Deliberate Practice"),
        encoding="utf-8",
        errors="backslashreplace",  # of paths whose bytes are no UTF-8
    )
    return page


def page_html(body: str, *, title: str) -> str:
    """Returns a page of one file that loads nothing, around the HTML of its body."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        "</title>"
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><link rel="icon" '
        'href="data:,">'
        f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def figure_html(
    path: Path, draw: Callable[[tuple[float, float]], Figure | None], caption: str
) -> str:
    """Returns a figure as HTML, drawn for a wide page and for a phone; the wide one is written to
    ``path``.
    """
    return _figure(path, draw(WIDE), draw(NARROW), caption)


def picture_html(path: Path, caption: str) -> str:
    """Returns a PNG file as a figure of a page."""
    return _img(path.read_bytes(), None, caption)


def _head(runs: list[Run], points: list[Point]) -> str:
    names, sentence = ", ".join(html.escape(run.path.name) for run in runs), lead(points)
    first = f'<p class="lead">{html.escape(sentence)}</p>' if sentence else ""
    return f'<h1>Deliberate Practice</h1><p class="sub">{len(runs)} run(s): {names}</p>{first}'


def _notes(runs: list[Run], refused: list[str]) -> str:
    notes = [*refused, *(note for run in runs for note in run.notes)]
    for key, values in differences(runs).items():
        notes.append(f"The recipes differ in {key}: {', '.join(json.dumps(v) for v in values)}")
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _samples(run: Run, figure: Callable[..., str], out: Path, device: torch.device | str) -> str:
    """Returns entropy at birth, error before and after inclusion, and contact sheets of every
    round.
    """
    name = run.path.name
    try:
        found = _chosen(run)
        if found is None:
            return _note(f"{name}: no samples are saved, so there are no contact sheets.")
        source, choice = found
        decode = decoder_of_run(run.path, device)
        pool = read_chosen(choice, choice.looked, LOOKED, decode=decode)
        parts = _figures(run, source, choice, pool, figure, device)
        del pool
        shown = read_chosen(choice, choice.shown, SHOWN, decode=decode)
    except (InputError, OSError) as error:
        return _note(f"{name}: its samples cannot be read: {error}")
    return parts + _sheets(run, shown, out)


def _chosen(run: Run) -> tuple[str, Choice] | None:
    """Returns the first source of a run that has saved samples, "dp" before all others, and which
    of them are looked at.
    """
    for source in dict.fromkeys(("dp", "static", *run.sources)):
        choice = choose(run.path / f"pool_{source}")
        if choice is not None and choice.total:
            return source, choice
    return None


def _figures(
    run: Run,
    source: str,
    choice: Choice,
    pool: SamplePool,
    figure: Callable[..., str],
    device: torch.device | str,
) -> str:
    """Returns figures of what becomes of the samples of a run."""
    name = run.path.name
    parts = []
    looked = f"{len(pool):,} of {choice.total:,} samples were looked at"
    if len(pool) == choice.total:
        looked = f"all {choice.total:,} samples were looked at"
    if choice.lost:
        parts.append(_note(f"{name}: {choice.lost:,} samples are lost or damaged."))
    caption = f"{name}: entropy of new samples at birth, by round; {looked}."
    parts.append(figure(f"births_{name}", partial(births, pool), caption))
    classes = choice.top + 1 if choice.classes is None else len(choice.classes)
    errors = errors_around(run, pool, classes, source=source, device=device)
    if errors is None:
        parts.append(
            _note(
                f"{name}: no checkpoints of every round (--keep-rounds true), so no errors of "
                "samples before and after inclusion."
            )
        )
    else:
        caption = (
            f"{name}: error of the learners at the ends of rounds on the samples of each round. "
            f"Hard: those that the learner of their inclusion mistook; {looked}."
        )
        parts.append(figure(f"inclusion_{name}", partial(inclusion, errors), caption))
    return "".join(parts)


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _sheets(run: Run, pool: SamplePool, out: Path) -> str:
    """Returns contact sheets of every round, entropy at birth rising to the right."""
    parts = []
    rounds, entropy, labels = (pool.column(name) for name in ("round", "entropy", "label"))
    for number in rounds.unique().tolist():
        rows = []
        for label in labels.unique().tolist():
            members = torch.nonzero((rounds == number) & (labels == label)).flatten()
            if len(members):
                rows.append(reduced(pool.images(members[entropy[members].argsort()])))
        picture = enlarged(tile(rows), rows[0].shape[-1])
        path = out / f"samples_{run.path.name}_round_{number:02d}.png"
        picture.save(path)
        caption = (
            f"{run.path.name}, round {number}: a row per class, "
            "entropy at birth rises to the right."
        )
        parts.append(picture_html(path, caption))
    return "".join(parts)


def _recipe(runs: list[Run]) -> str:
    text = html.escape(json.dumps(runs[0].recipe, indent=2, ensure_ascii=False))
    return (
        f"<h2>Recipe of {html.escape(runs[0].path.name)}</h2><div "
        f'class="scroll"><pre>{text}</pre></div>'
    )


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
    small = (
        f'<source media="(max-width:600px)" srcset="{_uri(narrow)}">' if narrow is not None else ""
    )
    return f"<figure><picture>{small}{image}</picture><figcaption>{text}</figcaption></figure>"


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
