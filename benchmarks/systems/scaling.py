"""A run on 8 to 256 ranks, simulated from stages and all-reduces timed here: `dpfast bench scaling
--record`.

A rank is a process with one thread. The stages are those of `fashion`; the loop is that of
`imagenet1k-sd15` up to 6.5 M samples, whose rounds and batches are large enough to be dealt to so
many. The all-reduces are gloo's between two processes of this machine; over more ranks they follow
the ring that `dpfast.planning.network` describes. What is assumed beside that:
`dpfast.planning.simulation`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_record_file, new_parser
from dpfast.cli.parser import at_least
from dpfast.config import Recipe
from dpfast.hardware.peaks import DEVICES
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.planning.measure import measure
from dpfast.planning.network import Link, link_of
from dpfast.planning.plan import plan
from dpfast.planning.simulation import Job, UnitSeconds, best_overlap, efficiency, in_turns
from dpfast.terminal import say
from dpfast.textfiles import read_json

RECORDS = RESULTS / "scaling.jsonl"
RANKS = (1, 2, 8, 32, 64, 128, 256)
SIZES = tuple(1 << power for power in range(14, 27, 2))  # bytes of an all-reduce
BATCHES = (4, 16, 64)  # images of a training step
SAMPLES = 6_500_000


def _reduce(rank: int, store: str, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    seconds = {}
    for size in SIZES:
        values, times = torch.zeros(size // 4), []
        for _ in range(rounds + 1):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - began)
        seconds[size] = statistics.median(times[1:])
    if rank == 0:
        Path(f"{store}.json").write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()


def all_reduces(rounds: int = 20) -> dict[int, float]:
    """Bytes -> seconds, medians of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(_reduce, args=(store, rounds), nprocs=2)
        return {int(size): seconds for size, seconds in read_json(Path(f"{store}.json")).items()}


def fitted(seconds: dict[int, float]) -> Link:
    """The latency of the smallest and the bandwidth of the largest all-reduce of two ranks."""
    small, large = min(seconds), max(seconds)
    return Link(latency=seconds[small], bandwidth=large / (seconds[large] - seconds[small]))


def steps(recipe: Recipe, count: int = 40) -> dict[int, list[float]]:
    """Batch size -> seconds of single training steps on images that are there."""
    found = {}
    for batch in BATCHES:
        torch.manual_seed(0)
        learner = build_learner(
            recipe.learner.model, classes=10, channels=1, **recipe.learner.options
        )
        trainer = Trainer(learner, recipe.learner, iterations=10**6)
        images, labels = torch.rand(batch, 1, 32, 32), torch.arange(batch) % 10
        times = []
        for _ in range(count + 5):
            began = time.perf_counter()
            float(trainer.step(images, labels))
            times.append(time.perf_counter() - began)
        found[batch] = times[5:]
    return found


def record_of(rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    recipe = Recipe.load("fashion")
    timings = measure(recipe)
    times = steps(recipe)
    reduces = all_reduces()
    medians = {batch: statistics.median(values) for batch, values in times.items()}
    small, large = min(medians), max(medians)
    image = (medians[large] - medians[small]) / (large - small)
    parameters = plan(recipe, "h100").stages.learner.parameters
    costs = UnitSeconds(
        unguided=timings.unguided,
        guided=timings.guided,
        image=image,
        step=max(medians[small] - small * image, 0.0),
        evaluation=timings.evaluation,
        gradients=4 * parameters,
        spread=tuple(value / medians[large] for value in times[large]),
    )
    link = fitted(reduces)
    return {
        "all_reduce_seconds": reduces,
        "step_seconds": medians,
        "costs": dataclasses.asdict(costs),
        "link": dataclasses.asdict(link),
        "measured": rows(
            costs,
            lambda ranks: link,
            plan(Recipe.load("imagenet1k-sd15"), "h100", samples=SAMPLES).job,
        ),
        "derived": derived(),
    }


def rows(costs: UnitSeconds, link: Callable[[int], Link], job: Job) -> list[dict[str, float]]:
    """Efficiencies of a schedule in turns by phase, and of the best one side by side."""
    alone, found = in_turns(job, costs, 1, link(1)), []
    for ranks in RANKS:
        turns = in_turns(job, costs, ranks, link(ranks))
        row = {"ranks": ranks, "hours": turns.seconds / 3600}
        row |= {
            name: getattr(alone, name) / (ranks * getattr(turns, name))
            for name in ("generation", "training", "evaluation", "seconds")
        }
        if ranks > 1:
            best = best_overlap(job, costs, ranks, link)
            row |= {
                "generating": best.generating,
                "overlapped": efficiency(job, costs, best, link),
                "overlapped_hours": best.seconds / 3600,
            }
        found.append(row)
    return found


def derived() -> dict[str, list[dict[str, float]]]:
    """The same for GPUs, from the planner's stages at its shares of the limit."""
    found = {}
    for name in ("imagenet1k-sd15", "imagenet1k-dit"):
        made = plan(Recipe.load(name), "h100", samples=SAMPLES)
        found[name] = rows(made.unit, partial(link_of, DEVICES["h100"]), made.job)
    return found


def table(found: list[dict[str, float]]) -> str:
    head = (
        "ranks",
        "hours",
        "generation",
        "training",
        "evaluation",
        "in turns",
        "side by side",
        "hours",
        "generating",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found:
        shares = [
            f"{row[name]:.0%}" for name in ("generation", "training", "evaluation", "seconds")
        ]
        other = ["-", "-", "-"]
        if "overlapped" in row:
            other = [
                f"{row['overlapped']:.0%}",
                f"{row['overlapped_hours']:.3g}",
                f"{row['generating']:.0f}",
            ]
        lines.append(
            f"| {row['ranks']:.0f} | {row['hours']:.3g} | " + " | ".join([*shares, *other]) + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("scaling", __doc__)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="of each stage (default 3)")
    add_record_file(parser, RECORDS)
    options = parser.parse_args(arguments)
    record = record_of(options.rounds)
    link = record["link"]
    print(f"gloo, two ranks: {1e6 * link['latency']:.0f} us and {link['bandwidth'] / 1e9:.2f} GB/s")
    say(f"\nstages measured here, one thread a rank\n\n{table(record['measured'])}")
    for name, found in record["derived"].items():
        say(f"\n{name} on H100s, derived\n\n{table(found)}")
    if options.record is not None:
        timing.append(options.record, "scaling", [record])
    return 0
