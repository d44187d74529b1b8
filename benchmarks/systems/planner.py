"""The planner's prediction for `fashion` beside the run itself: `dpfast bench plan --record`.

The stages are timed first, as `dpfast plan fashion --device here` does, then the recipe runs. Both
take this machine.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_record_file, new_parser
from dpfast.config import Recipe
from dpfast.planning.measure import measure
from dpfast.planning.plan import plan
from dpfast.practice.experiment import DeliberatePractice
from dpfast.terminal import say

RECORDS = RESULTS / "plan.jsonl"
TARGET = 0.25  # a prediction may be so far from what was measured


def compare(recipe: Recipe) -> dict[str, Any]:
    """Seconds predicted and measured, by phase and in all; of Deliberate Practice alone."""
    began = time.perf_counter()
    timings = measure(recipe)
    timed = time.perf_counter() - began
    practice = DeliberatePractice(recipe)
    began = time.perf_counter()
    (result,) = practice.run(progress=False)
    whole = time.perf_counter() - began
    made = plan(recipe, "here", timings=timings, samples=len(result.pool))
    planned: dict[str, float] = {"generation": 0.0, "training": 0.0, "evaluation": 0.0}
    for phase in made.phases:
        kind = "generation" if "samples" in phase.name else phase.name
        if kind in planned:  # the yardstick's samples are in the whole alone
            planned[kind] += phase.seconds
    measured = {
        "generation": result.generation_seconds,
        "training": result.training_seconds,
        "evaluation": result.evaluation_seconds,
    }
    return {
        "recipe": recipe.name,
        "samples": len(result.pool),
        "planned_samples": recipe.practice.maximum_samples,
        "measuring_seconds": timed,
        "predicted": {**planned, "whole": made.seconds},
        "measured": {**measured, "whole": whole},
    }


def table(record: dict[str, Any]) -> str:
    lines = ["| phase | predicted, s | measured, s | predicted / measured |", "|---|---|---|---|"]
    for name, seconds in record["measured"].items():
        guess = record["predicted"][name]
        lines.append(f"| {name} | {guess:.1f} | {seconds:.1f} | {guess / seconds:.2f} |")
    return "\n".join(lines)


def missed(record: dict[str, Any]) -> list[str]:
    """The phases whose prediction is too far off."""
    off = {
        name: record["predicted"][name] / seconds - 1
        for name, seconds in record["measured"].items()
    }
    return [
        f"{name}: {value:+.0%}, target {TARGET:.0%}"
        for name, value in off.items()
        if abs(value) > TARGET
    ]


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a prediction is too far off."""
    parser = new_parser("plan", __doc__)
    add_record_file(parser, RECORDS)
    options = parser.parse_args(arguments)
    record = compare(Recipe.load("fashion", sources="dp"))
    say(table(record))
    for line in missed(record):
        print(f"missed: {line}")
    if options.record is not None:
        timing.append(options.record, "plan", [record])
    return 1 if missed(record) else 0
