"""Which rules of patience the paper's tables allow, and how many samples a recipe reaches under
each.

    dpfast bench patience

Tables 4 and 5 of arXiv 2502.15588 print, for runs of N initial samples and P a round, the epoch at
which a branch with k additions leaves the run, chosen just before the next addition. An epoch is
read as a pass over the N initial samples, and an evaluation comes after each. Between two branches
every addition waits for T_max evaluations at the least, so a rule whose sum of them is larger than
the epochs between is not the paper's.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.arguments import new_parser
from dpfast.config import Recipe
from dpfast.practice.patience import Patience
from dpfast.terminal import say

Rule = Callable[
    [int, float, int], int
]  # T_max from its initial value, pool / N and the additions so far
STABLE = 0.8  # of the iterations come before the cool-down, in which nothing is added
LATE = 1  # epochs: an addition is at its branch's epoch or right after it

VALIDATION = 2500  # images that drive a run of ImageNet-100 without ``held_out``
# pool / N, and the accuracy that it allows
SIZES, ACCURACIES = (
    (1, 2, 7, 14, 24),
    (0.52, 0.57, 0.62, 0.64, 0.65),
)
FIRST = 0.35  # accuracy after the warm-up
NOISES = (0.002, 0.005, 0.009)
PACES = (0.02, 0.1)
SEEDS = range(10)

SHIPPED = ("coverage", "pool", "round", "fixed")
OTHERS: dict[str, Rule] = {
    "T0 sqrt(pool/N)": lambda first, times, _: math.ceil(first * math.sqrt(times)),
    "T0 (1 + ln(pool/N))": lambda first, times, _: math.ceil(first * (1 + math.log(times))),
    "one more a doubling": lambda first, times, _: first + int(math.log2(times)),
    "one more a tenfold": lambda first, times, _: first + int(math.log10(times)),
    "one more every 10 rounds": lambda first, _, rounds: first + rounds // 10,
    "one more every 30 rounds": lambda first, _, rounds: first + rounds // 30,
    "a half of the pool": lambda first, times, _: max(first, math.ceil(times / 2)),
    "a third of the pool": lambda first, times, _: max(first, math.ceil(times / 3)),
}


@dataclass(frozen=True)
class Run:
    """A row of the tables: sizes in thousands, T_max at the start, passes over N up to the
    cool-down, k -> epoch.
    """

    table: str
    initial: int
    round: int
    patience: int
    passes: float
    branches: dict[int, int]
    additions: int | None = None  # of a run that is printed to its end


def _imagenet100(
    initial: int, round: int, patience: int, branches: dict[int, int], end: int | None = None
) -> Run:
    return Run("Table 4", initial, round, patience, STABLE * 50 * 2048 / initial, branches, end)


def _imagenet1k(initial: int, round: int, branches: dict[int, int], end: int | None = None) -> Run:
    return Run("Table 5", initial, round, 1, STABLE * 100 * 4096 / initial, branches, end)


RUNS = (
    _imagenet100(32, 16, 6, {3: 662, 4: 701, 5: 767, 6: 859, 8: 951}),
    _imagenet100(64, 32, 4, {6: 469, 8: 606, 11: 782, 18: 1001}),
    _imagenet100(130, 130, 14, {}, 6),
    _imagenet100(130, 64, 5, {27: 494, 47: 618}),
    _imagenet100(
        130, 64, 5, {26: 494, 47: 618}
    ),  # the same: its 1.794 M samples, printed with k = 27, are k = 26
    _imagenet1k(160, 160, {1: 134}),
    _imagenet1k(320, 160, {1: 191}),
    _imagenet1k(320, 320, {1: 71}),
    _imagenet1k(654, 654, {1: 124, 2: 156}, 19),
    _imagenet1k(1300, 650, {10: 246}),
)


@dataclass(frozen=True)
class Span:
    """Additions whose waiting lies in a known number of evaluations: those after ``first``, ...,
    ``last`` others.
    """

    run: Run
    first: int
    last: int
    evaluations: int

    def least(self, rule: Rule) -> int:
        """Evaluations that these additions take if none of them is a new best."""
        run = self.run
        rounds = range(self.first, self.last + 1)
        return sum(rule(run.patience, 1 + k * run.round / run.initial, k) for k in rounds)


def spans(run: Run) -> Iterator[Span]:
    """From the start to the first branch, between branches, and to the end of a run that is printed
    to its end.
    """
    first, since = 0, 0
    for additions, epoch in run.branches.items():
        yield Span(run, first, additions, epoch - since + (LATE if since else 0))
        first, since = additions + 1, epoch
    if run.additions is not None:
        yield Span(run, 0, run.additions - 1, int(run.passes))


def shipped(growth: str) -> Rule:
    """A rule of ``dpfast.practice.patience``."""

    def rule(first: int, times: float, rounds: int) -> int:
        patience = Patience(first, 10**6, growth)
        patience.rounds = rounds
        return patience.limit(round(times * 10**6))

    return rule


RULES = {name: shipped(name) for name in SHIPPED} | OTHERS


def fits(rule: Rule) -> bool:
    """Whether the tables allow a rule."""
    return all(span.least(rule) <= span.evaluations for run in RUNS for span in spans(run))


def samples_reached(recipe: Recipe, growth: str, noise: float, pace: float, seed: int) -> int:
    """Samples at the end of a simulated run of a recipe, under one of the shipped rules.

    With every evaluation the accuracy comes nearer, by ``pace`` of the gap, to what the size of the
    pool allows: ``ACCURACIES`` over the logarithm of ``SIZES``, near those of Table 4. It is
    measured on ``VALIDATION`` images, with noise of standard deviation ``noise`` that keeps 0.7 of
    itself from one evaluation to the next, as averaged weights.
    """
    practice, chance = recipe.practice, random.Random(seed)
    interval = practice.interval(recipe.learner.batch_size)
    begin = math.ceil(recipe.learner.warmup * practice.iterations / interval)
    end = int((1 - recipe.learner.cooldown) * practice.iterations // interval)
    patience = Patience(practice.patience, practice.initial_samples, growth)
    pool = practice.initial_samples
    accuracy = FIRST
    error = 0.0
    for _ in range(begin, end):
        allowed = np.interp(math.log(pool / practice.initial_samples), np.log(SIZES), ACCURACIES)
        accuracy += (float(allowed) - accuracy) * pace
        error = 0.7 * error + math.sqrt(1 - 0.7**2) * chance.gauss(0, noise)
        measured = round((accuracy + error) * VALIDATION) / VALIDATION
        if patience.update(measured, pool) and pool < practice.maximum_samples:
            pool = min(pool + practice.round_samples, practice.maximum_samples)
            patience.added()
    return pool


def rules_table() -> str:
    tight = [span for run in RUNS for span in spans(run) if span.first > 8]
    header = [
        "rule",
        *(f"{s.run.initial}k + {s.run.round}k, {s.first + 1} to {s.last + 1}" for s in tight),
        "all spans",
    ]
    lines = [
        header,
        ["---"] * len(header),
        ["there are", *(str(span.evaluations) for span in tight), ""],
    ]
    for name, rule in RULES.items():
        needed = [span.least(rule) for span in tight]
        lines.append([name, *map(str, needed), "fits" if fits(rule) else "does not fit"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reached_table(name: str) -> str:
    recipe = Recipe.load(name)
    lines = [f"| {name} | fewest | median | most |", "|---|---|---|---|"]
    for growth in SHIPPED:
        ends = sorted(
            samples_reached(recipe, growth, n, p, s) for n in NOISES for p in PACES for s in SEEDS
        )
        values = (ends[0], statistics.median_low(ends), ends[-1])
        lines.append(
            f"| {growth} | " + " | ".join(f"{value / 1e6:.2f} M" for value in values) + " |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where the recipes' rule does not fit."""
    new_parser("patience", __doc__).parse_args(arguments)
    say(f"{rules_table()}\n\n{reached_table('imagenet100-sd15')}")
    return 0 if fits(RULES["coverage"]) else 1
