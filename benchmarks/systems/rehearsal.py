"""A rehearsal held against a run: what the embedded recipe holds in memory, counted without data
and measured.

    dpfast bench rehearsal --record

Both walk the same short run of `fashion` (`dpfast.rehearsal.walk.cut`), with batches so large that
tensors and not libraries fill the memory. Measured is what the process holds at most beyond what it
held before (VmHWM against VmRSS), with an allocator that gives freed blocks back at once
(MALLOC_MMAP_THRESHOLD_): the memory of a process only grows otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_record_file, new_parser
from benchmarks.harness.processes import command
from dpfast.cli.parser import in_one_line
from dpfast.textfiles import lines

RECORDS = RESULTS / "rehearsal.jsonl"
SIZES = ((500, 256), (1000, 512))  # samples and images of a batch
MMAP = "65536"  # bytes; every larger block is a mapping of its own, and goes when it is freed
WITHIN = 0.10  # of what was measured


def recipe(samples: int, images: int) -> Any:
    """The short recipe with batches of these sizes."""
    from dpfast.config import Recipe
    from dpfast.parallel import ALONE
    from dpfast.rehearsal.walk import cut

    whole = Recipe.load(
        "fashion",
        generator={"batch_size": samples},
        learner={"batch_size": images},
        host_gib=0.1,
        loader="torch",
    )
    return cut(whole, ALONE, 10)


def measured(samples: int, images: int) -> int:
    """Bytes that a real run took, in a process of its own."""
    run = command("benchmarks.systems.rehearsal", "--child", str(samples), str(images))
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": MMAP, "OMP_NUM_THREADS": "2"}
    out = subprocess.run(run, check=True, capture_output=True, encoding="utf-8", env=environment)
    return int(json.loads(lines(out.stdout)[-1])["bytes"])


def child(samples: int, images: int) -> None:
    """Runs the recipe and prints what it took."""
    from dpfast.practice.experiment import DeliberatePractice

    practice = DeliberatePractice(recipe(samples, images))  # loads all libraries and weights
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
    practice.run(None, progress=False)
    print(json.dumps({"bytes": _status("VmHWM") - before}))


def _status(name: str) -> int:
    told = lines(Path("/proc/self/status").read_text(encoding="utf-8"))
    return 1024 * next(int(line.split()[1]) for line in told if line.startswith(name))


def rehearsed(samples: int, images: int) -> dict[str, int]:
    """Bytes that the rehearsal counts beyond the models', by phase."""
    from dpfast.parallel import ALONE
    from dpfast.rehearsal.device import FakeDevice
    from dpfast.rehearsal.walk import walk

    device = FakeDevice()
    walk(recipe(samples, images), ALONE, device, gpu=False)
    weights = device.phases["initial samples"].kinds["generator"]
    return {
        name: memory.peak - weights
        for name, memory in device.phases.items()
        if name not in ("models", "start") and not name.startswith("restarted")
    }


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where the rehearsal is further from the run than ``WITHIN``."""
    parser = new_parser("rehearsal", __doc__)
    add_record_file(parser, RECORDS)
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        child(*options.child)
        return 0
    records = []
    print(
        "| samples, images of a batch | measured | rehearsed | ratio | phase of the peak "
        "|\n|---|---|---|---|---|"
    )
    for samples, images in SIZES:
        phases, took = rehearsed(samples, images), measured(samples, images)
        name = max(phases, key=phases.__getitem__)
        ratio = phases[name] / took
        records.append(
            {
                "samples": samples,
                "images": images,
                "measured": took,
                "phases": phases,
                "ratio": ratio,
            }
        )
        print(
            f"| {samples}, {images} | {took / 1e6:.0f} MB | {phases[name] / 1e6:.0f} MB | "
            f"{ratio:.3f} | {name} |",
            flush=True,
        )
    if options.record is not None:
        timing.append(options.record, "rehearsal", records)
    return int(any(abs(record["ratio"] - 1) > WITHIN for record in records))


if __name__ == "__main__":
    raise SystemExit(in_one_line("dpfast bench rehearsal", main))
