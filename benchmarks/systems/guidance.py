"""What guidance buys and what it costs: entropy of the learner against what two judges make of the
labels, resumable.

    dpfast bench guidance [RUN]                       # hours; each cell is a line of the results
    dpfast bench guidance --tables --figure docs/images/guidance_curves.png
    dpfast bench guidance --sheet docs/images/guidance.png  # the same samples, guided more

A cell is a form of guidance at one strength; every cell makes the same labels with the same noise.
One learner guides all of them: that of the finished run in the folder RUN, or the one that a run of
the recipe `fashion`, guided as the paper does, leaves; it is trained once and kept. Its weights
depend on the number of threads: those of the committed cells are of two, ``OMP_NUM_THREADS=2``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.harness import records, timing
from benchmarks.harness.arguments import (
    add_lines,
    add_rows,
    check_rows,
    is_wanted,
    lines_file,
    new_parser,
)
from benchmarks.studies.settings import PAPER, late
from benchmarks.systems import fewer_steps, guidance_tables
from benchmarks.systems.ablation import FIRST_ID
from dpfast.cli.parser import at_least
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.evaluate.measures import predict
from dpfast.files import there
from dpfast.generate import step
from dpfast.generate.guidance import GuidanceConfig, label_score
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import JUDGES, load_judge, load_learner
from dpfast.ops import guided_step
from dpfast.practice.experiment import DeliberatePractice
from dpfast.report.sheets import contact_sheet
from dpfast.terminal import say

RECORDS = RESULTS / "guidance.jsonl"
CACHE = Path("runs") / "guidance"
STEPS, EVERY, CFG = 8, 2, 1.5  # those of the study
# what the learner that guides was trained by, whatever the recipe's own fields become
LEARNER: dict[str, Any] = {
    "sources": "dp",
    **PAPER,
    "steps": STEPS,
    "every": EVERY,
    "cfg_scale": CFG,
    "seed": 0,
}
BRIEFLY = {"initial_samples": 80, "round_samples": 40, "maximum_samples": 120, "iterations": 40}
OMEGAS = (0.12, 0.05, 0.08, 0.2, 0.03)  # in the order in which they are measured
BATCH = 100
SHOWN = 20  # images of a row of the sheet
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One form of guidance at one strength. projected: the gradient without its part against the
    label score, in place of an anchor; late: the anchor in the second half of the steps alone.
    """

    omega: float
    kappa: float = 0.0
    cfg_scale: float = CFG
    projected: bool = False
    late: bool = False

    @property
    def form(self) -> str:
        """What a curve over omega keeps."""
        if self.projected:
            return "projected"
        late = " late" if self.late else ""
        return f"CFG {self.cfg_scale:g}, kappa {self.kappa:g}{late}"

    @property
    def name(self) -> str:
        return f"{self.form}, omega {self.omega:g}"


def cells() -> Iterator[Cell]:
    """All cells: a coarse answer first, then the curves between, then the strengths at the ends."""
    forms = {
        1: ({}, {"cfg_scale": 2.5}, {"projected": True}, {"kappa": 0.5}, {"kappa": 1.0}),
        2: ({"cfg_scale": 3.5}, {"kappa": 0.25}, {"cfg_scale": 2.0}, {"kappa": 2.0}),
        3: ({"kappa": 1.0, "late": True}, {"kappa": 2.0, "late": True}),
    }
    yield Cell(0.0)
    ways = ((1, OMEGAS[:3]), (2, OMEGAS[:3]), (1, OMEGAS[3:]), (2, OMEGAS[3:]), (3, OMEGAS))
    for near, omegas in ways:
        for omega in omegas:
            yield from (Cell(omega, **form) for form in forms[near])
    yield from (Cell(0.0, cfg_scale=scale) for scale in (2.5, 3.5, 2.0))


SHORT = [Cell(0.0), Cell(0.12), Cell(0.12, projected=True), Cell(0.12, kappa=0.5)]
ROWS = {  # of the sheet
    "unguided": Cell(0.0),
    "omega 0.05": Cell(0.05),
    "omega 0.12": Cell(0.12),
    "omega 0.2": Cell(0.2),
    "omega 0.2, kappa 0.5": Cell(0.2, kappa=0.5),
}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine (B,) of each sample's pair; 0 where one of the two is zero."""
    norms = (_dot(a, a) * _dot(b, b)).sqrt()
    return torch.where(norms > 0, _dot(a, b) / norms, 0.0)


def without_part_against(gradient: Tensor, score: Tensor) -> Tensor:
    """A gradient (B, c, h, w) without its component along -score, sample by sample:
    g - min(0, g.c) / |c|^2 c; as it is where the score is zero.
    """
    squares = _dot(score, score)
    share = _dot(gradient, score).clamp(max=0) / squares
    return gradient - torch.where(squares > 0, share, 0.0).view(-1, 1, 1, 1) * score


class Watch:
    """Stands in for ``guided_step``, which has both predictions and the gradient: notes the cosine
    of the gradient and the label score, and may project.

    cosines: of each guided step its (B,).
    """

    def __init__(self, projected: bool) -> None:
        self.projected = projected
        self.cosines: list[Tensor] = []

    def guided_step(
        self,
        x: Tensor,
        cond: Tensor,
        uncond: Tensor | None,
        grad: Tensor | None,
        *rest: Any,
        **o: Any,
    ) -> Tensor:
        if grad is not None and uncond is not None:
            score = label_score(cond, uncond, o["prediction"])
            self.cosines.append(cosine(grad.double(), score.double()))
            if self.projected:
                grad = without_part_against(grad, score)
        return guided_step(x, cond, uncond, grad, *rest, **o)


class Bench:
    """The generator, its judges, and the learner that guides."""

    def __init__(self, run: Path | None, *, short: bool = False) -> None:
        self.pipeline = Pipeline.from_pretrained("fashion")
        folder = trained(short) if run is None else run
        self.learner = load_learner(folder, self.pipeline)
        weights = (Path(folder) / "learner_dp.safetensors").read_bytes()
        self.named = hashlib.sha256(weights).hexdigest()[:12]
        self.judges = [load_judge(number) for number in JUDGES]

    def settings(self, cell: Cell, count: int) -> Record:
        """What tells a line from others."""
        return {
            "cell": cell.name,
            "form": cell.form,
            "omega": cell.omega,
            "kappa": cell.kappa,
            "cfg_scale": cell.cfg_scale,
            "projected": cell.projected,
            "samples": count,
            "steps": STEPS,
            "every": EVERY,
            "learner": self.named,
            **({"late": True} if cell.late else {}),
        }

    def sampled(self, cell: Cell, count: int, watch: Watch) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (N,), images (N, 1, 32, 32) uint8 and entropies (N,) of the cell."""
        sampler = GuidedSampler(
            self.pipeline,
            self.learner,
            guidance=GuidanceConfig(
                omega=cell.omega,
                anchor=cell.kappa,
                every=EVERY,
                anchor_schedule=late() if cell.late else (),
            ),
            steps=STEPS,
            cfg_scale=cell.cfg_scale,
            compile=False,  # a compiled step would look its name up no more
        )
        labels = torch.arange(count) % len(self.pipeline.class_names)
        with mock.patch.object(step, "guided_step", watch.guided_step):
            batches = list(sampler.stream(labels, first_id=FIRST_ID, batch_size=BATCH))
        images = torch.cat([batch.images for batch in batches])
        return labels, images, torch.cat([batch.entropy for batch in batches])

    def measure(self, cell: Cell, count: int) -> Record:
        """One cell's line. Seconds are those of the processor, which other work on the machine
        changes little.
        """
        watch, started = Watch(cell.projected), time.process_time()
        labels, images, entropy = self.sampled(cell, count, watch)
        seconds = time.process_time() - started
        wrong = predict(self.learner, images).argmax(1) != labels
        said = torch.stack([predict(judge, images).argmax(1) for judge in self.judges])
        agrees = said == labels
        both = agrees.all(0)
        record = self.settings(cell, count) | {
            "entropy": fewer_steps.mean(entropy),
            "agreement": [fewer_steps.mean(each.float()) for each in agrees],
            "alike": fewer_steps.mean((said[0] == said[1]).float()),
            "wrong": fewer_steps.mean(wrong.float()),
            "right_of_wrong": [share(each[wrong]) for each in (*agrees, both)],
            "useful": fewer_steps.mean((wrong & both).float()),
            "seconds": 1000 * seconds / count,
        }
        if watch.cosines:
            guided = len(GuidanceConfig(every=EVERY).steps(STEPS))
            parts = [watch.cosines[i : i + guided] for i in range(0, len(watch.cosines), guided)]
            cosines = torch.cat([torch.stack(part, 1) for part in parts])  # (N, guided)
            record["cosine"] = fewer_steps.mean(cosines.mean(1))
            record["cosine_negative"] = fewer_steps.mean((cosines < 0).float().mean(1))
        return record

    def sheet(self, file: Path) -> Path:
        """Writes a picture of the same samples in each cell of ``ROWS``, a row each."""
        rows = [self.sampled(cell, SHOWN, Watch(cell.projected))[1] for cell in ROWS.values()]
        title = "The same labels and noise under rising guidance"
        return contact_sheet(rows, tuple(ROWS), title, file)


def share(hits: Tensor) -> tuple[float, float] | None:
    """The share of (n,) bool that is true, and its standard error; None of fewer than two."""
    return fewer_steps.mean(hits.float()) if len(hits) > 1 else None


def trained(short: bool) -> Path:
    """The folder of the run whose learner guides, from the cache or trained now."""
    folder = CACHE / ("learner-short" if short else "learner")
    if not there(folder / "learner_dp.safetensors"):
        recipe = Recipe.load("fashion", **LEARNER, **(BRIEFLY if short else {}))
        DeliberatePractice(recipe).run(folder, overwrite=True, progress=False)
    return folder


def finished(results: Path) -> list[Record]:
    """The lines of cells that are done. Raises ``InputError`` as ``read_records`` does."""
    return records.read_records(results, guidance_tables.KINDS, guidance_tables.KNOWN)


def check_learner(named: str, lines: Iterable[Record], results: Path) -> None:
    """Raises ``InputError`` where another learner guided a line: no table could hold its cells and
    those of this one, and hours would be lost.
    """
    others = sorted({line["learner"] for line in lines} - {named})
    if others:
        raise InputError(
            f"results = {str(results)!r}: has cells of the learner {', '.join(others)}, and "
            f"{named} would guide the new ones; train it on the same kind of processor with as "
            "many threads, or give another --results"
        )


def chosen(rows: str, *, short: bool) -> list[Cell]:
    """The cells that ``--rows`` asks for."""
    every = SHORT if short else list(cells())
    check_rows((cell.name for cell in every), rows)
    return [cell for cell in every if is_wanted(cell.name, rows)]


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("guidance", __doc__)
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help="folder of a finished run, whose learner guides (default: one of the recipe fashion, "
        "guided as the paper does, trained once and kept in runs/guidance)",
    )
    parser.add_argument(
        "--count", type=at_least(2), default=5000, help="samples of each cell (default 5000)"
    )
    add_rows(parser)
    add_lines(parser, "cell", short="few cells and a learner of few steps")
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw what the cells so far say, and make nothing",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="a picture of the same samples in some cells"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    for option in ("figure", "sheet"):
        if getattr(options, option) is not None:
            records.check_picture(option, getattr(options, option))
    only_read = options.tables or options.figure is not None
    results = lines_file(options.results, RECORDS, only_read=only_read)
    finished(results)  # that it can be read is known before anything is made
    if only_read:
        lines = guidance_tables.latest(finished(results), results)
        if options.tables:
            say("\n".join(guidance_tables.tables(lines)))
        if options.figure is not None:
            guidance_tables.figure(lines).savefig(options.figure, dpi=110)
        return 0
    wanted = chosen(options.rows, short=options.short)
    bench = Bench(options.run, short=options.short)
    if options.sheet is not None:
        bench.sheet(options.sheet)
        return 0
    check_learner(bench.named, finished(results), results)
    for cell in wanted:
        settings = bench.settings(cell, options.count)
        # before, or in another process
        if any(line.items() >= settings.items() for line in finished(results)):
            continue
        record = bench.measure(cell, options.count)
        timing.append(results, "guidance", [record])
        print(f"{cell.name}: {guidance_tables.told(record)}", file=sys.stderr, flush=True)
    return 0
