"""The study: accuracy against samples, omega, oversampling and patience on the embedded generator, resumable.

    dpfast bench study --part scaling --seeds 0,1,2

Every finished run is one line of `benchmarks/results/study.jsonl`; a run that is there already is skipped. Unguided
samples are made once for a seed and shared by all runs, which pay for them what their making cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpfast.config import Recipe
from dpfast.generate.pipelines import Pipeline
from dpfast.pool.pool import SamplePool
from dpfast.pool.saver import Saver
from dpfast.practice.costs import Cost
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.sources import Round, StaticSource, Unguided

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
CACHE = Path("runs") / "study"
SIZES = (500, 1000, 2000, 4000, 8000)
OMEGAS = (0.0, 0.015, 0.03, 0.05, 0.08)
RATIOS = (1.0, 2.0, 3.0, 4.0)
PARTS = ("scaling", "rivals", "omega", "ratio", "patience")
Fields = dict[str, Any]


def pieces(part: str, sizes: tuple[int, ...] = SIZES) -> Iterator[Fields]:
    """The recipe fields of a part's runs. Rounds are an eighth of the total, and half of it is there at the start."""
    middle = sizes[len(sizes) // 2]

    def run(source: str, total: int, **fields: Any) -> Fields:
        return {"sources": source, "maximum_samples": total, "initial_samples": total // 2,
                "round_samples": total // 8, **fields}  # fmt: skip

    if part in ("scaling", "rivals"):
        sources = ("dp", "static") if part == "scaling" else ("dynamic", "prune")
        yield from (run(source, size) for size in sizes for source in sources)
    elif part == "omega":
        yield from (run("dp", middle, omega=omega) for omega in OMEGAS)
    elif part == "ratio":
        yield from (run("prune", middle, oversample=ratio) for ratio in RATIOS)
    else:
        yield from (run("dp", middle, patience_growth=growth) for growth in ("fixed", "pool", "round"))


def shared(recipe: Recipe, samples: int) -> Unguided:
    """The seed's unguided samples, from the cache folder or made now and kept there."""
    pipeline = Pipeline.from_pretrained(recipe.generator.pipeline)
    unguided, generator = Unguided(recipe, pipeline), recipe.generator
    folder = CACHE / f"unguided-seed{recipe.seed}-steps{generator.steps}-cfg{generator.cfg_scale:g}-{samples}"
    if not (folder / "cost.json").is_file():
        source, pool = StaticSource(recipe, unguided, samples), SamplePool()
        for batch in source.make(Round(number=0, start=0, count=samples)):
            pool.append(batch, round=0, omega=0.0)
        with Saver(pool, folder, truncate=True) as saver:
            saver.save()
        (folder / "cost.json").write_text(json.dumps(asdict(source.cost)))
    unguided.remember(SamplePool.open(folder), Cost(**json.loads((folder / "cost.json").read_text())))
    return unguided


def measure(fields: Fields, unguided: Unguided) -> Fields:
    """One run's line."""
    recipe = Recipe.load("fashion", **fields)
    (result,) = DeliberatePractice(recipe, unguided=unguided).run(progress=False)
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
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dpfast bench study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; default: all")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--iterations", type=int, default=1200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--short", action="store_true", help="two small sizes and few iterations, for a test")
    options = parser.parse_args(arguments)
    sizes = (80, 160) if options.short else SIZES
    common: Fields = {"iterations": 40 if options.short else options.iterations, "steps": 8, "guide_every": 2}
    done = set()
    if options.results.is_file():
        done = {json.dumps(json.loads(line)["fields"], sort_keys=True) for line in options.results.open()}
    for seed in map(int, options.seeds.split(",")):
        unguided: Unguided | None = None
        for part in options.part or PARTS:
            for piece in pieces(part, sizes):
                fields = {**common, **piece, "seed": seed}
                if json.dumps(fields, sort_keys=True) in done:
                    continue
                # prune draws up to the last oversampled id; what the cache lacks is made when it is asked for
                unguided = unguided or shared(Recipe.load("fashion", **{**fields, "sources": "static"}), sizes[-1])
                line = json.dumps({**measure(fields, unguided), "part": part, "fields": fields})
                done.add(json.dumps(fields, sort_keys=True))
                options.results.parent.mkdir(parents=True, exist_ok=True)
                with options.results.open("a") as file:
                    file.write(line + "\n")
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
