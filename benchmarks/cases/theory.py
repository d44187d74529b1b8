"""The theory against its experiment: a grid of cells, every printed form, and what predicting and
simulating cost.

    dpfast bench theory --record

Off the interpolation peak, |d / (n keep) - 1| > 0.25, the deviation of a prediction from the
simulated mean is that of the formula and of the finite d; near it a finite d smooths what the limit
makes a pole, at small ridges.
"""

from __future__ import annotations

import time
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.harness import gate, timing
from benchmarks.harness.arguments import add_record_file, new_parser
from benchmarks.harness.registry import OURS, Case, Variants
from dpfast.cli.parser import at_least
from dpfast.terminal import say
from dpfast.theory import simulate, test_error
from dpfast.theory.theorem import FORMS

RECORDS = RESULTS / "theory.jsonl"
TESTS = "tests/theory"
D = 512
DRAWS = 20
EVALUATIONS = 1_000_000
SELECTIONS = (("hard", 1.0), ("hard", 0.9), ("hard", 0.6), ("easy", 0.9))  # strategy, rho
POOLS = (256, 1024, 2048, 3072, 6144)
KEEPS = (1.0, 0.8, 0.5, 0.2, 0.1)
RIDGES = (1e-6, 1e-2, 1e-1)
LEAST_KEPT = 100
TARGETS = {"max": 0.009, "mean": 0.002, "evaluation seconds": 1.0, "simulation seconds": 180.0}


class Grid(NamedTuple):
    """One entry a cell."""

    strategy: np.ndarray
    rho: np.ndarray
    n: np.ndarray
    keep: np.ndarray
    ridge: np.ndarray

    @property
    def off_peak(self) -> np.ndarray:
        return np.abs(D / (self.n * self.keep) - 1) > 0.25

    def of(self, strategy: str) -> tuple[np.ndarray, dict[str, Any]]:
        """Where the cells of a strategy are, and their arguments."""
        here = self.strategy == strategy
        return here, {"d": D, "strategy": strategy} | {
            name: getattr(self, name)[here] for name in self._fields[1:]
        }


def grid() -> Grid:
    pools = [(n, keep) for n, keep in product(POOLS, KEEPS) if n * keep >= LEAST_KEPT]
    cells = [(*s, *pool, ridge) for s, pool, ridge in product(SELECTIONS, pools, RIDGES)]
    return Grid(*map(np.array, zip(*cells, strict=True)))


def simulated(cells: Grid, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean errors and their standard errors."""
    out = np.empty((2, len(cells.n)))
    for strategy in np.unique(cells.strategy):
        here, arguments = cells.of(strategy)
        out[:, here] = simulate(**arguments, draws=draws, seed=seed)
    return out[0], out[1]


def predicted(cells: Grid, form: str) -> np.ndarray:
    out = np.empty(len(cells.n))
    for strategy in np.unique(cells.strategy):
        here, arguments = cells.of(strategy)
        out[here] = test_error(**arguments, form=form)
    return out


def build(device: torch.device) -> Variants:
    """EVALUATIONS cells, no two arguments of which broadcast, of each strategy that has a closed
    form.
    """
    rng = np.random.default_rng(0)
    arguments = {
        "d": rng.integers(64, 1024, EVALUATIONS),
        "n": rng.integers(64, 8192, EVALUATIONS),
        "keep": rng.uniform(0.05, 1, EVALUATIONS),
        "rho": rng.uniform(-1, 1, EVALUATIONS),
        "ridge": 10 ** rng.uniform(-6, 0, EVALUATIONS),
    }
    return {
        f"{OURS}, {strategy}": (lambda s=strategy: test_error(**arguments, strategy=s))
        for strategy in ("hard", "easy")
    }


CASES = [Case(operation="test_error", size=f"{EVALUATIONS:,} cells", tests=TESTS, build=build)]


def measure(draws: int, seed: int, rounds: int) -> dict[str, Any]:
    """The record: deviations of every form on and off the peak, seconds, and all cells."""
    cpu, cells = torch.device("cpu"), grid()
    times = timing.interleave(build(cpu), rounds, cpu)
    start = time.perf_counter()
    found, stderr = simulated(cells, draws, seed)
    seconds = time.perf_counter() - start
    forms = {form: predicted(cells, form) for form in FORMS}
    parts = {"off": cells.off_peak, "on": ~cells.off_peak}
    return {
        "cells": {part: int(here.sum()) for part, here in parts.items()},
        "draws": draws,
        "seed": seed,
        "stderr": {
            part: {"mean": stderr[here].mean(), "max": stderr[here].max()}
            for part, here in parts.items()
        },
        "deviation": {
            form: {
                part: {
                    "mean": np.abs(error - found)[here].mean(),
                    "max": np.abs(error - found)[here].max(),
                }
                for part, here in parts.items()
            }
            for form, error in forms.items()
        },
        "evaluation_seconds": {
            name: {"median": t.median, "minimum": t.minimum} for name, t in times.items()
        },
        "simulation_seconds": seconds,
        "columns": [*Grid._fields, "simulated", "stderr", *FORMS],
        "rows": [
            [str(row[0]), *(round(float(x), 6) for x in row[1:])]
            for row in zip(*cells, found, stderr, *forms.values(), strict=True)
        ],
    }


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    count = record["cells"]
    lines = [
        f"| form | max off the peak ({count['off']} cells) | mean | max on the peak ({count['on']} "
        "cells) | mean |",
        "|---|---|---|---|---|",
    ]
    for form, parts in record["deviation"].items():
        lines.append(
            f"| {form} | "
            + " | ".join(f"{parts[p][k]:.4f}" for p in ("off", "on") for k in ("max", "mean"))
            + " |"
        )
    error = record["stderr"]["off"]
    lines += [
        "",
        f"Standard errors off the peak: mean {error['mean']:.4f}, max {error['max']:.4f}.",
    ]
    for name, seconds in record["evaluation_seconds"].items():
        lines.append(
            f"{EVALUATIONS:,} evaluations, {name}: median {seconds['median']:.2f} s, best "
            f"{seconds['minimum']:.2f} s."
        )
    return "\n".join(
        [
            *lines,
            f"Simulation of all {sum(count.values())} cells: {record['simulation_seconds']:.0f} s.",
        ]
    )


def missed(record: dict[str, Any]) -> list[str]:
    """What is beyond its target, one line each."""
    exact = record["deviation"]["exact"]["off"]
    slowest = max(seconds["median"] for seconds in record["evaluation_seconds"].values())
    values = {
        **exact,
        "evaluation seconds": slowest,
        "simulation seconds": record["simulation_seconds"],
    }
    return [
        f"{name}: {values[name]:.4g}, target {most:g}"
        for name, most in TARGETS.items()
        if values[name] > most
    ]


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where the tests fail or a target is missed."""
    parser = new_parser("theory", __doc__)
    parser.add_argument(
        "--draws", type=at_least(2), default=DRAWS, help=f"of each cell (default {DRAWS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="timings of the evaluations (default 5)"
    )
    add_record_file(parser, RECORDS)
    parser.add_argument("--no-gate", action="store_true", help="skip the tests, and record nothing")
    options = parser.parse_args(arguments)
    report = None if options.no_gate else gate.failure(TESTS)
    if report is not None:
        print(f"the tests fail, nothing is measured\n{report}")
        return 1
    record = measure(options.draws, options.seed, options.rounds)
    say(table(record))
    for line in missed(record):
        print(f"missed: {line}")
    if options.record is not None and not options.no_gate:
        timing.append(options.record, "theory", [record])
    return 1 if missed(record) else 0
