"""Cheaper steps: reused features, solvers of distilled models, and guidance in one, two and four
steps, beside whole steps of the same samples.

Each group has a reference with the same labels, ids and first noise. Quality is that of every
sample; seconds are of batches that take turns within a group, of eager steps.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import timing
from benchmarks.harness.arguments import add_device, new_parser
from benchmarks.systems import fewer_steps
from benchmarks.systems.ablation import Bench, qualities
from dpfast.cli.parser import at_least
from dpfast.terminal import say

DDIM: dict[str, Any] = {"solver": "ddim", "steps": 20, "every": 5, "omega": 0.03}
PLAIN = DDIM | {"every": 1, "omega": 0.0}
GROUPS: dict[str, tuple[dict[str, Any], ...]] = {
    "guided": (DDIM, DDIM | {"cache_interval": 2}),
    "unguided": (
        PLAIN,
        *(PLAIN | {"cache_interval": n} for n in (2, 3)),
        *(PLAIN | {"steps": n} for n in (8, 4)),
        *(PLAIN | {"solver": solver, "steps": 4} for solver in ("dpmpp2m", "lcm", "tcd")),
    ),
} | {
    f"{solver} in {steps}": tuple(
        {"solver": solver, "steps": steps, "every": 1, "omega": omega} for omega in (0.0, 0.03, 0.1)
    )
    for steps, solver in ((1, "lcm"), (2, "lcm"), (4, "lcm"), (2, "ddim"), (4, "ddim"))
}


def table(tried: list[dict[str, Any]], seconds: dict[int, float]) -> str:
    """Markdown; the first record is the reference."""
    lines = [
        "| solver | steps | cache interval | omega | samples/s | entropy, nats | agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for index, record in enumerate(tried):
        (change, error) = record["entropy_change"]
        (points, points_error) = record["agreement_change"]
        cells = [record["solver"], record["steps"], record.get("cache_interval", 1)]
        cells.append(record["omega"])
        cells.append(
            f"{1 / seconds[index]:.1f} ({seconds[0] / seconds[index]:.2f}x)" if seconds else ""
        )
        cells.append(f"{record['entropy'][0]:.3f} ({change:+.1%} ± {error:.1%})")
        cells.append(
            f"{record['agreement'][0]:.1%} ({100 * points:+.1f} ± {100 * points_error:.1f})"
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def speed(
    bench: Bench, options: tuple[dict[str, Any], ...], batch: int, rounds: int
) -> dict[int, float]:
    """Seconds of a sample of each setting, medians over batches in turns."""
    labels = torch.arange(batch, device=bench.device) % 10
    samplers = [bench.sampler(compile=False, **option) for option in options]
    calls = {
        str(i): functools.partial(sampler.generate, labels) for i, sampler in enumerate(samplers)
    }
    timed = timing.interleave(calls, rounds, bench.device)
    return {int(name): times.median / batch for name, times in timed.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("cheaper", __doc__)
    parser.add_argument(
        "--learner", help="the run folder whose learner guides; default: one trained for 15 s"
    )
    parser.add_argument(
        "--samples", type=at_least(1), default=2048, help="of each setting (default 2048)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=64, help="of the timed batches (default 64)"
    )
    parser.add_argument(
        "--rounds",
        type=at_least(0),
        default=5,
        help="timed batches of each setting; 0: none (default 5)",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="finished settings are left here, not done again",
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        metavar="GROUP",
        default=list(GROUPS),
        help=f"those of {', '.join(GROUPS)} (default: all)",
    )
    add_device(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.learner, Path(folder), options.device, compile=False)
        quality = qualities(bench, options.samples, 0, options.keep)
        for name in options.groups:
            settings = GROUPS[name]
            seconds = (
                speed(bench, settings, options.batch_size, options.rounds) if options.rounds else {}
            )
            print(f"{name}: {seconds}", file=sys.stderr, flush=True)
            rows = fewer_steps.search(quality, settings[0], settings[1:])
            say(f"{name}\n\n{table(rows, seconds)}\n")
    return 0
