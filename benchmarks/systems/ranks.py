"""Two ranks beside one, a thread each: `dpfast bench ranks`.

The ranks are processes as torchrun starts them. In turns rank 0 does the whole work while the
others wait, and all do it together: the ratio of the two times is the gain of that many ranks.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_record_file, new_parser
from dpfast.cli.parser import at_least
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.evaluate.measures import evaluate
from dpfast.feed.augment import Augment
from dpfast.feed.torch_loader import TorchLoader
from dpfast.generate.from_recipe import load_pipeline, new_sampler
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.parallel import ALONE, Ranks, process_group
from dpfast.pool.pool import SamplePool
from dpfast.pool.record import RECORD
from dpfast.pool.sharded import ShardLayout, pool_of_ranks
from dpfast.terminal import say
from dpfast.textfiles import read_json

SAMPLES, BATCH = 80, 20  # of a generation
POOL, LEARNED, STEPS = 2000, 256, 2  # samples, batch of the learner, steps of a measurement
EVALUATED = 2000
VIT = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
Work = Callable[[Ranks], Callable[[], object]]


def generation(ranks: Ranks) -> Callable[[], object]:
    """Guided samples of the embedded recipe, dealt in batches."""
    recipe = Recipe.load("fashion")
    pipeline = load_pipeline(recipe.generator, device="cpu")
    learner = _learner("regnet", 10).eval()
    sampler = new_sampler(recipe, pipeline, learner)
    ids = ranks.indices(SAMPLES, BATCH)

    def make() -> None:
        for _ in sampler.stream(ids % 10, sample_ids=ids, batch_size=BATCH):
            pass

    return make


def learning(kind: str) -> Work:
    """Optimiser steps with their batches: crops, flips, mixing, and between ranks the exchange of
    samples.
    """

    def prepare(ranks: Ranks) -> Callable[[], object]:
        layout = ShardLayout(ranks, BATCH, (POOL,))
        rows = torch.cat([torch.arange(r.start, r.stop) for r in layout.rows()])
        local = SamplePool()
        images = torch.randint(0, 256, (len(rows), 1, 32, 32), dtype=torch.uint8)
        local.append_records(images, records_of(rows.numpy()))
        pool = pool_of_ranks(local, layout)
        config = replace(Recipe.load("fashion").learner, precision="fp32")
        trainer = Trainer(_learner(kind, 10), config, iterations=10_000, ranks=ranks)
        augment = Augment(flip=True, crop=0.3, mixup=0.5)
        loader = TorchLoader(pool, batch_size=LEARNED, seed=0, augment=augment, classes=10)

        def step() -> None:
            for _ in range(STEPS):
                trainer.step(*next(loader))

        return step

    return prepare


def evaluation(ranks: Ranks) -> Callable[[], object]:
    mine, model = ranks.indices(EVALUATED, 500), _learner("regnet", 10).eval()
    images, labels = torch.zeros(len(mine), 1, 32, 32, dtype=torch.uint8), mine % 10
    return lambda: evaluate(model, images, labels, ranks)


WORKS: dict[str, tuple[Work, float | None]] = {  # and the gain of two ranks that is asked for
    f"generation, {SAMPLES} guided samples": (generation, 1.8),
    f"learner step, ViT of 1.8 M parameters, batch {LEARNED}": (learning("vit"), 1.6),
    f"learner step, the embedded recipe's RegNet, batch {LEARNED}": (learning("regnet"), 1.6),
    f"evaluation, {EVALUATED} images": (evaluation, None),
}


def _learner(kind: str, classes: int) -> nn.Module:
    torch.manual_seed(0)
    if kind == "vit":
        return build_learner(
            "transformers:ViTForImageClassification", classes=classes, channels=1, **VIT
        )
    learner = Recipe.load("fashion").learner
    return build_learner(learner.model, classes=classes, channels=1, **learner.options)


def records_of(ids: np.ndarray) -> np.ndarray:
    records = np.zeros(len(ids), RECORD)
    records["sample_id"], records["label"] = ids, ids % 10
    return records


def _rank(rank: int, size: int, port: int, rounds: int, chosen: list[str], out: Path) -> None:
    here = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    records = []
    with process_group(cuda=False) as ranks:
        for name in chosen:
            work, target = WORKS[name]
            together, alone = work(ranks), work(ALONE) if ranks.first else lambda: None
            seconds: dict[str, list[float]] = {"one": [], "all": []}
            for number in range(rounds + 1):
                for kind, call in (("one", alone), ("all", together)):
                    # who waits for the store looks now and then only
                    ranks.control.all_reduce(torch.zeros(1))
                    started = time.perf_counter()
                    call()
                    ranks.control.all_reduce(torch.zeros(1))
                    if number:  # the first is warm-up
                        seconds[kind].append(time.perf_counter() - started)
            one, every = statistics.median(seconds["one"]), statistics.median(seconds["all"])
            records.append(
                {
                    "case": name,
                    "ranks": size,
                    "rounds": rounds,
                    "one": one,
                    "all": every,
                    "gain": one / every,
                    "target": target if size == 2 else None,
                }
            )
    if rank == 0:
        out.write_text(json.dumps(records), encoding="utf-8")


def gains(size: int, rounds: int, chosen: list[str]) -> list[dict[str, Any]]:
    """Seconds of one rank and of all, medians over the rounds."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(_rank, (size, port, rounds, chosen, Path(folder) / "out.json"), nprocs=size)
        return read_json(Path(folder) / "out.json")


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| | one rank, s | all, s | gain | asked for |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['case']}, {r['ranks']} ranks | {r['one']:.3f} | {r['all']:.3f} | "
        f"{r['gain']:.2f}x | "
        f"{r['target'] or ''} |"
        for r in records
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("ranks", __doc__)
    parser.add_argument("--ranks", type=at_least(1), default=2, help="processes (default 2)")
    parser.add_argument(
        "--rounds", type=at_least(1), default=7, help="measurements of each (default 7)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    add_record_file(parser, RESULTS / "ranks.jsonl")
    options = parser.parse_args(arguments)
    chosen = [name for name in WORKS if options.only in name]
    if not chosen:
        raise InputError(f"only = {options.only!r}: no case; there are {'; '.join(WORKS)}")
    records = gains(options.ranks, options.rounds, chosen)
    say(table(records))
    if options.record is not None:
        timing.append(options.record, "ranks", ({"threads": 1, **record} for record in records))
    return 0
