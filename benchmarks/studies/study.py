"""The study: accuracy against samples, omega, oversampling and patience on the embedded generator,
resumable.

    dpfast bench study --part scaling --seeds 0,1,2

Every finished run is one line of `benchmarks/results/study.jsonl`; a run that is there already is
skipped. Unguided samples are made once for a seed and shared by all runs, which pay for them what
their making cost.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.harness.arguments import add_lines, lines_file, new_parser
from benchmarks.harness.records import append_line, read_records
from benchmarks.studies.births import nearest_earlier
from benchmarks.studies.settings import COMMON, OPTIONS, Fields, recipe_of
from benchmarks.studies.tables import tables
from dpfast.cli.parser import at_least
from dpfast.config import Recipe
from dpfast.evaluate.measures import Evaluation
from dpfast.generate.pipelines import Pipeline
from dpfast.hardware.device import device_named
from dpfast.pool.pool import SamplePool
from dpfast.pool.reader import open_pool
from dpfast.pool.saver import Saver
from dpfast.practice.callbacks import Callback, Progress
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.result import Result
from dpfast.sources.costs import Cost
from dpfast.sources.source import RoundRequest
from dpfast.sources.static import StaticSource
from dpfast.sources.unguided import UnguidedSamples
from dpfast.terminal import say
from dpfast.textfiles import TABLE, read_json, read_json_lines

RECORDS = RESULTS / "study.jsonl"
CACHE = Path("runs") / "study"
SIZES = (500, 1000, 2000, 4000, 8000)
OMEGAS = (0.0, 0.015, 0.03, 0.05, 0.08)
RATIOS = (1.0, 2.0, 4.0, 8.0)
PARTS = ("scaling", "omega", "rivals", "ratio", "time", "patience", "options")


def pieces(part: str, sizes: tuple[int, ...] = SIZES, iterations: int = 1200) -> Iterator[Fields]:
    """The recipe fields of a part's runs. A quarter of the total is there at the start, rounds are
    an eighth of it.
    """
    middle, largest = sizes[len(sizes) // 2], sizes[-1]

    def run(source: str, total: int, **fields: Any) -> Fields:
        return {
            "sources": source,
            "maximum_samples": total,
            "initial_samples": total // 4,
            "round_samples": total // 8,
            "iterations": iterations,
            **fields,
        }

    if part in ("scaling", "rivals"):
        sources = ("dp", "static") if part == "scaling" else ("dynamic", "prune")
        yield from (run(source, size) for size in sizes for source in sources)
    elif part == "omega":
        yield from (run("dp", middle, omega=omega) for omega in OMEGAS)
    elif part == "ratio":
        yield from (run("prune", middle, oversample=ratio) for ratio in RATIOS)
    elif part == "time":  # half of the iterations
        contest = (
            ("dp", sizes[1]),
            ("dp", middle),
            ("static", middle),
            ("static", largest),
            ("prune", middle),
        )
        yield from (run(source, size, iterations=iterations // 2) for source, size in contest)
        # what the omega sweep prefers, for as long as a third of the largest static run's seconds
        # allow
        yield run("dp", sizes[1], iterations=iterations * 5 // 8, omega=OMEGAS[-1])
    elif part == "patience":
        yield from (
            run("dp", middle, patience_growth=growth) for growth in ("fixed", "pool", "round")
        )
    else:
        yield from (run("dp", middle, **option) for option in OPTIONS)


def cached(recipe: Recipe, samples: int) -> Path:
    """The file that the seed's unguided samples end with, where they are kept or will be."""
    made = recipe.generator
    name = f"unguided-seed{recipe.seed}-steps{made.steps}-cfg{made.cfg_scale:g}-{samples}"
    return CACHE / name / "cost.json"


def shared(recipe: Recipe, samples: int) -> UnguidedSamples:
    """The seed's unguided samples, from the cache folder or made now and kept there."""
    pipeline = Pipeline.from_pretrained(
        recipe.generator.pipeline, device=device_named(recipe.device)
    )
    unguided, cost = UnguidedSamples(recipe, pipeline), cached(recipe, samples)
    folder = cost.parent
    if not cost.is_file():
        source, pool = StaticSource(recipe, unguided, samples), SamplePool()
        for batch in source.make(RoundRequest(number=0, start=0, count=samples)):
            pool.append(batch, round=0, omega=0.0)
        with Saver(pool, folder, truncate=True) as saver:
            saver.save()
        cost.write_text(json.dumps(asdict(source.cost)), encoding="utf-8")
    unguided.remember(open_pool(folder), Cost(**read_json(cost)))
    return unguided


class Curve(Callback):
    """(iteration, pool size, validation accuracy) of every evaluation."""

    def __init__(self) -> None:
        self.points: list[tuple[int, int, float]] = []

    def on_evaluation(self, progress: Progress, evaluation: Evaluation, loss: float) -> None:
        self.points.append((progress.step, progress.pool_size, round(evaluation.top1, 4)))


def measure(fields: Fields, unguided: UnguidedSamples) -> Fields:
    """One run's line."""
    recipe, curve = recipe_of(fields), Curve()
    (result,) = DeliberatePractice(recipe, unguided=unguided).run(progress=False, callbacks=[curve])
    return line_of(recipe, result, curve)


def line_of(recipe: Recipe, result: Result, curve: Curve) -> Fields:
    """What a line says of every run."""
    return {
        "source": result.source,
        "samples": len(result.pool),
        "seed": recipe.seed,
        "omega": recipe.guidance.omega if result.source == "dp" else 0.0,
        "oversample": recipe.practice.oversample if result.source == "prune" else 1.0,
        "patience": recipe.practice.patience_growth,
        "iterations": result.iterations,
        "additions": result.additions,
        "validation_accuracy": result.validation.top1,
        "test_accuracy": result.test.top1,
        "generation_seconds": result.cost.seconds,
        "training_seconds": result.training_seconds,
        "samples_made": result.cost.samples,
        "denoiser_forwards": result.cost.forwards,
        "flops": result.cost.flops,
        "nearest": nearest_earlier(result.pool),
        "curve": curve.points,
    }


def finished(results: Path) -> list[Fields]:
    """The fields of the runs that have a line."""
    return [line["fields"] for _, line in read_json_lines(results)] if results.is_file() else []


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError("expected whole numbers with commas between them")
    return [int(seed) for seed in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("study", __doc__)
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="may be repeated; default: all"
    )
    parser.add_argument("--seeds", type=_seeds, default="0", help="comma-separated")
    parser.add_argument(
        "--iterations", type=at_least(1), default=1200, help="of each run (default 1200)"
    )
    add_lines(parser, "run", short="two small sizes and few iterations")
    options = parser.parse_args(arguments)
    results = lines_file(options.results, RECORDS, only_read=options.tables)
    read_records(results, {"fields": TABLE}, needed=options.tables)
    if options.tables:
        say("\n".join(tables(results)))
        return 0
    sizes = (80, 160) if options.short else SIZES
    iterations = 40 if options.short else options.iterations
    unguided: dict[int, UnguidedSamples] = {}
    for part in options.part or PARTS:
        for seed in options.seeds:
            for piece in pieces(part, sizes, iterations):
                fields = {**COMMON, **piece, "seed": seed}
                # before, in another process, or for another part
                if fields in finished(results):
                    continue
                if seed not in unguided:
                    # prune draws up to the last oversampled id; what the cache lacks is made when
                    # it is asked for
                    unguided[seed] = shared(recipe_of({**fields, "sources": "static"}), sizes[-1])
                line = measure(fields, unguided[seed]) | {"part": part, "fields": fields}
                append_line(results, line)
    return 0
