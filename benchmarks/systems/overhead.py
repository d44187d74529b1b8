"""What a run costs beside its work: the start with 1,000 classes, rank 0's bookkeeping of each
sample, and the manifest that is written anew with each shard.

    dpfast bench overhead --record

The start is that of `imagenet1k-sd15` with a tiny random Stable Diffusion pipeline, so that loading
weights takes nothing, and real images of the usual size. The bookkeeping is measured at pools of
10^4 to 10^7 samples whose payloads are a byte each, in as many chunks as payloads of 224 px would
fill. The manifest's bytes and seconds are summed over all shards of a run, from ``POINTS`` lengths
that are written in turns: the sum grows with the square of the samples of a rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import CHECKOUT, RESULTS
from benchmarks.harness.arguments import add_record_file, new_parser
from benchmarks.harness.processes import command
from dpfast.cli.parser import at_least, in_one_line
from dpfast.errors import InputError
from dpfast.pool.shards import MANIFEST, Manifest, Shard
from dpfast.terminal import say
from dpfast.textfiles import lines

RECORDS = RESULTS / "overhead.jsonl"
CLASSES, IMAGES, PICTURE = 1000, 2, (500, 375)  # images a class; pixels, the mean of ImageNet's
SIZES = (10**4, 10**5, 10**6, 10**7)
BATCH = 250
DEALT = 40
SHARD = 10_000
RUNS = {  # samples of a rank, samples of a shard: 512 MiB of payloads, or 10,000
    "10 M at 224 px, raw, one rank": (10**7, (512 << 20) // (3 * 224 * 224)),
    "10 M, 10,000 a shard, one rank": (10**7, SHARD),
    "9.1 M at 224 px, raw, 32 ranks": (9_100_000 // 32, (512 << 20) // (3 * 224 * 224)),
}
POINTS = 16
PAYLOAD, CHUNK = 3 * 224 * 224, 64 << 20  # of the chunks that are counted
TARGETS = {"start": 20.0, "growth": 1.5}  # seconds; a sample at 10^7 over one at 10^4


def start_seconds(rounds: int) -> dict[str, Any]:
    """Medians of ``rounds`` starts, each in a process of its own."""
    from PIL import Image

    from dpfast import imagenet
    from tests.tiny_pipelines import stable_diffusion

    with tempfile.TemporaryDirectory() as folder:
        generator, validation = Path(folder) / "generator", Path(folder) / "validation"
        stable_diffusion(generator)
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
        picture = Image.fromarray(noise).resize(PICTURE, Image.Resampling.BICUBIC)
        for wordnet_id in imagenet.load().ids:
            (validation / wordnet_id).mkdir(parents=True)
            for i in range(IMAGES):
                picture.save(validation / wordnet_id / f"{i}.JPEG", quality=90)
        start = command("benchmarks.systems.overhead", "--child", str(generator), str(validation))
        runs = []
        for _ in range(rounds):
            began = time.perf_counter()
            out = subprocess.run(start, check=True, capture_output=True, encoding="utf-8")
            runs.append(
                {**json.loads(lines(out.stdout)[-1]), "process": time.perf_counter() - began}
            )
    stages = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "part": "start",
        "rounds": rounds,
        "classes": CLASSES,
        "images": CLASSES * IMAGES,
        "seconds": stages,
    }


def child(generator: str, validation: str) -> None:
    """One start up to the first sample, stage by stage; prints the seconds as JSON."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    with stage("imports"):
        import torch

        from dpfast.config import Recipe
        from dpfast.data.real import check_real, load_real
        from dpfast.generate.from_recipe import check_generator, load_pipeline
        from dpfast.hardware.device import device_named
        from dpfast.practice import experiment  # noqa: F401  what `dpfast run` imports
        from dpfast.practice.loop import Loop
        from dpfast.sources.guided_methods import check_guided_method
        from dpfast.sources.unguided import UnguidedSamples
    with stage("recipe"):
        changes: dict[str, Any] = {
            "codec": "latents",
            "mapped": False,
        }  # 9.1 M samples of this pipeline fit anywhere
        if not torch.cuda.is_available():
            changes["dtype"] = "float32"  # bf16 is emulated on most CPUs
        recipe = Recipe.load(
            "imagenet1k-sd15", pipeline=generator, validation=validation, **changes
        )
    with stage("folders"):
        check_real(validation, "", check_generator(recipe.generator))
    with stage("pipeline and prompts"):
        pipeline = load_pipeline(recipe.generator, device=device_named(recipe.device))
    with stage("real images"):
        shape = pipeline.image_shape
        real = load_real(validation, classes=pipeline.class_names, shape=shape)
    with stage("learner, pool and loader"):
        check_guided_method(recipe, pipeline)
        UnguidedSamples(recipe, pipeline)
        Loop(recipe, "dp", pipeline, real)
    print(json.dumps(seconds))


def bookkeeping(rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a sample at each size, medians of ``rounds``."""
    import torch

    from dpfast.feed.order import Order
    from dpfast.pool.memory_tiers import MemoryTiers
    from dpfast.pool.pool import SamplePool
    from dpfast.pool.record import RECORD
    from dpfast.pool.saver import Saver

    def records(start: int, count: int) -> np.ndarray:
        rows = np.zeros(count, RECORD)
        rows["sample_id"] = np.arange(start, start + count)
        return rows

    def median(call: Callable[[], int]) -> float:
        """Of a sample; ``call`` gives how many it was about."""
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            count = call()
            times.append((time.perf_counter() - began) / count)
        return 1e6 * statistics.median(times)

    pool = SamplePool(
        shape=(1, 1, 1), tiers=MemoryTiers(host_bytes=1 << 34), chunk_bytes=CHUNK // PAYLOAD
    )
    order, found = Order(0, 4096), []

    def append(count: int) -> int:
        pool.append_records(
            torch.zeros(count, 1, 1, 1, dtype=torch.uint8), records(len(pool), count)
        )
        return count

    def appended() -> int:
        return sum(append(BATCH) for _ in range(SHARD // BATCH))

    def drawn() -> int:
        return sum(len(order.next(len(pool))) for _ in range(20))

    for size in SIZES:
        while len(pool) < size:
            append(min(SHARD, size - len(pool)))
        appending, drawing = median(appended), median(drawn)
        with tempfile.TemporaryDirectory() as folder:
            shards = [shard_like_those_of_ranks(i, SHARD) for i in range(size // SHARD)]
            Manifest("pixels", [1, 1, 1], "npy", None, shards).write(Path(folder))
            with Saver(pool, folder, shard_samples=SHARD) as saver:
                began = time.perf_counter()
                saver.save()
                saved = saver.wait() - size
                saving = 1e6 * (time.perf_counter() - began) / saved
            manifest = (Path(folder) / MANIFEST).stat().st_size
        found.append(
            {
                "part": "bookkeeping",
                "samples": len(pool),
                "chunks": len(pool.snapshot.chunks.chunks),
                "manifest_bytes": manifest,
                "microseconds": {"append": appending, "order": drawing, "save": saving},
            }
        )
    return found


def shard_like_those_of_ranks(number: int, samples: int) -> Shard:
    """The line of a shard whose ids one of several ranks lists, batch by batch."""
    first = number * samples
    runs = [[i, i + DEALT - 1] for i in range(first, first + samples, DEALT)]
    return Shard(f"shard-{number:06d}.tar", samples, 16 << 20, "0" * 64, "0" * 64, runs)


def manifests(rounds: int) -> list[dict[str, Any]]:
    """What writing the manifest with each shard sums up to on a rank, for each of ``RUNS``; the
    seconds of a write are the least of ``rounds``.
    """
    found = []
    for run, (samples, of_shard) in RUNS.items():
        shards = [shard_like_those_of_ranks(i, of_shard) for i in range(-(-samples // of_shard))]
        bytes, seconds = [], []
        with tempfile.TemporaryDirectory() as folder:
            for point in range(POINTS):  # the middles of equal parts of the run
                held = shards[: max(1, round(len(shards) * (point + 0.5) / POINTS))]
                manifest = Manifest("pixels", [3, 224, 224], "npy", None, held)
                manifest.write(Path(folder))  # makes the lines, as the shards before did
                times = []
                for _ in range(rounds):
                    began = time.perf_counter()
                    manifest.write(Path(folder))
                    times.append(time.perf_counter() - began)
                seconds.append(min(times))
                bytes.append((Path(folder) / MANIFEST).stat().st_size)
        found.append(
            {
                "part": "manifest",
                "run": run,
                "shards": len(shards),
                "last_bytes": bytes[-1],
                "bytes": round(statistics.mean(bytes) * len(shards)),
                "seconds": statistics.mean(seconds) * len(shards),
            }
        )
    return found


def table(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in (r for r in records if r["part"] == "start"):
        lines += ["| start | seconds |", "|---|---|"]
        lines += [f"| {name} | {seconds:.2f} |" for name, seconds in record["seconds"].items()]
    books = [r for r in records if r["part"] == "bookkeeping"]
    if books:
        names = list(books[0]["microseconds"])
        lines += [
            "",
            "| samples | chunks | manifest, bytes | "
            + " | ".join(f"{n}, us a sample" for n in names)
            + " |",
        ]
        lines.append("|---" * (3 + len(names)) + "|")
        for r in books:
            cells = [f"{r[k]:,}" for k in ("samples", "chunks", "manifest_bytes")]
            lines.append(
                "| " + " | ".join([*cells, *(f"{r['microseconds'][n]:.2f}" for n in names)]) + " |"
            )
    sums = [r for r in records if r["part"] == "manifest"]
    if sums:
        lines += ["", "| run | shards | manifest at its end | written in all | seconds in all |"]
        lines.append("|---" * 5 + "|")
        lines += [
            f"| {r['run']} | {r['shards']:,} | {r['last_bytes'] / 1e6:.2g} MB | "
            f"{r['bytes'] / 1e9:.2g} GB | {r['seconds']:.2g} |"
            for r in sums
        ]
    return "\n".join(lines)


def missed(records: list[dict[str, Any]]) -> list[str]:
    """What is beyond its target, one line each."""
    found = []
    for record in (r for r in records if r["part"] == "start"):
        if record["seconds"]["process"] > TARGETS["start"]:
            found.append(
                f"start: {record['seconds']['process']:.1f} s, target {TARGETS['start']:g} s"
            )
    books = [r for r in records if r["part"] == "bookkeeping"]
    if books:
        first, last = (sum(r["microseconds"].values()) for r in (books[0], books[-1]))
        if last > TARGETS["growth"] * first:
            found.append(f"bookkeeping: {last:.1f} us a sample at the end, {first:.1f} at first")
    return found


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "start": lambda rounds: [start_seconds(rounds)],
    "bookkeeping": bookkeeping,
    "manifest": manifests,
}


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a target is missed."""
    parser = new_parser("overhead", __doc__)
    parser.add_argument("--part", choices=list(PARTS), help="one of them")
    parser.add_argument(
        "--rounds", type=at_least(1), default=3, help="measurements of each (default 3)"
    )
    add_record_file(parser, RECORDS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(*options.child)
        return 0
    parts = [options.part] if options.part else list(PARTS)
    if not CHECKOUT and "start" in parts:
        missing = "the tiny generator of 'start' is one of the tests, which are part of a checkout"
        if options.part:
            raise InputError(f"part = 'start': {missing}")
        print(f"without 'start': {missing}", file=sys.stderr)
        parts.remove("start")
    records = [record for part in parts for record in PARTS[part](options.rounds)]
    say(table(records))
    for line in missed(records):
        print(f"missed: {line}")
    if options.record is not None:
        from benchmarks.harness import timing

        timing.append(options.record, "overhead", records)
    return 1 if missed(records) else 0


if __name__ == "__main__":
    raise SystemExit(in_one_line("dpfast bench overhead", main))
