"""A run on many ranks, simulated from what its stages take: rounds and training in turns, or side
by side.

In turns, all ranks make a round's samples, then all train up to the next. Side by side ("overlap"),
some ranks make the next round's samples under the learner as it was when the segment began, while
the others train; the initial samples and the cool-down, in which none are made, take all ranks.
What is assumed:

- the rounds come at equal distances between the first step and the cool-down;
- samples are dealt in whole generation batches, and a batch that is not full costs a full one;
- a training step takes a fixed time, a time for each image of the rank's part of the batch, and the
  all-reduce beside its backward pass; all ranks wait for the slowest (``slowest``);
- evaluations are dealt by image. Saving, which a thread of its own does, and moving samples cost
nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.planning.network import Link, step_seconds


@dataclass(frozen=True, kw_only=True)
class Job:
    """The work of a run.

    Attributes:
        initial: Samples before training.
        rounds: Samples of each addition.
        segments: Training steps before each of them and after the last.
        batch_size: Images of a training step, of all ranks.
        generation_batch_size: Samples of a rank's batch.
        evaluated: Images of all evaluations.
    """

    initial: int
    rounds: tuple[int, ...]
    segments: tuple[int, ...]
    batch_size: int
    generation_batch_size: int
    evaluated: int = 0

    @property
    def longest(self) -> int:
        """The steps of the longest segment that a round ends."""
        return max(self.segments[:-1], default=0)

    def __post_init__(self) -> None:
        if len(self.segments) != len(self.rounds) + 1:
            raise InputError(
                f"segments = {self.segments}: expected {len(self.rounds) + 1}, one more than rounds"
            )


@dataclass(frozen=True, kw_only=True)
class UnitSeconds:
    """The seconds of one unit of each stage on one rank.

    Attributes:
        unguided: Seconds of an unguided sample.
        guided: Seconds of a guided sample.
        image: Seconds of an image in a training step.
        evaluation: Seconds of an evaluated image.
        step: Seconds of a training step beside its images.
        gradients: Bytes that an all-reduce sums.
        spread: Measured times of a step over their median; of one value all ranks are equally
            fast.
    """

    unguided: float
    guided: float
    image: float
    evaluation: float = 0.0
    step: float = 0.0
    gradients: float = 0.0
    spread: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """The seconds of a simulated run.

    Attributes:
        ranks: Number of ranks.
        generating: Ranks that make samples beside training; 0: in turns.
        generation: Seconds in which samples alone are made.
        training: Seconds of training alone.
        overlapped: Seconds of both at once.
        evaluation: Seconds of evaluation.
    """

    ranks: int
    generating: int
    generation: float
    training: float
    overlapped: float
    evaluation: float

    @property
    def seconds(self) -> float:
        return self.generation + self.training + self.overlapped + self.evaluation


def job_of(recipe: Recipe, samples: int, evaluated: int = 0) -> Job:
    """Returns a recipe's loop up to ``samples``: rounds after the steps of ``add_at``, or evenly
    between the first step and the cool-down; none of the source "static" alone. Raises
    ``InputError`` for more rounds than ``add_at`` names.
    """
    practice, batch = recipe.practice, recipe.learner.batch_size
    initial = samples if practice.takes_all_at_once else min(practice.initial_samples, samples)
    more = samples - initial
    count = math.ceil(more / practice.round_samples)
    rounds = tuple(
        min(practice.round_samples, more - i * practice.round_samples) for i in range(count)
    )
    stable = practice.iterations - round(practice.iterations * recipe.learner.cooldown)
    ends = [stable * i // max(count, 1) for i in range(count + 1)] if count else [0]
    if practice.add_at:
        if count > len(practice.add_at):
            raise InputError(
                f"samples = {samples}: expected at most {practice.most_samples}, to which the "
                "steps of add_at lead"
            )
        ends = [0, *practice.add_at[:count]]
    segments = (*(b - a for a, b in itertools.pairwise(ends)), practice.iterations - ends[-1])
    return Job(
        initial=initial,
        rounds=rounds,
        segments=segments,
        batch_size=batch,
        generation_batch_size=recipe.generator.batch_size,
        evaluated=evaluated,
    )


def slowest(spread: Sequence[float], ranks: int) -> float:
    """Returns the expected largest of ``ranks`` independent draws from ``spread``."""
    ordered, count = sorted(spread), len(spread)
    return sum(
        v * (((i + 1) / count) ** ranks - (i / count) ** ranks) for i, v in enumerate(ordered)
    )


def in_turns(job: Job, unit: UnitSeconds, ranks: int, link: Link) -> SimulatedRun:
    """Simulates a run in which all ranks make samples, then all train."""
    made = sum(
        _making(count, unit.guided, job.generation_batch_size, ranks) for count in job.rounds
    )
    return SimulatedRun(
        ranks=ranks,
        generating=0,
        generation=_making(job.initial, unit.unguided, job.generation_batch_size, ranks) + made,
        training=sum(job.segments) * _step(job, unit, ranks, link),
        overlapped=0.0,
        evaluation=math.ceil(job.evaluated / ranks) * unit.evaluation,
    )


def side_by_side(
    job: Job,
    unit: UnitSeconds,
    ranks: int,
    generating: int,
    link: Link,
    *,
    whole: Link | None = None,
) -> SimulatedRun:
    """Simulates a run in which ``generating`` ranks make the next round's samples while the others
    train. link: of those;
    whole: of all ranks.

    A round begins with its segment, so that samples are as old as that is long: a run does so with
    an ``overlap_staleness`` of ``Job.longest`` steps or more. With fewer it begins a round anew
    again and again, and waits for most of it.

    Raises ``InputError`` unless both parts have a rank.
    """
    if not 0 < generating < ranks:
        raise InputError(f"generating = {generating}: expected 1 to {ranks - 1} of {ranks} ranks")
    step = _step(job, unit, ranks - generating, link)
    beside = sum(
        max(steps * step, _making(count, unit.guided, job.generation_batch_size, generating))
        for steps, count in zip(job.segments, job.rounds, strict=False)
    )
    return SimulatedRun(
        ranks=ranks,
        generating=generating,
        generation=_making(job.initial, unit.unguided, job.generation_batch_size, ranks),
        training=job.segments[-1] * _step(job, unit, ranks, whole or link),
        overlapped=beside,
        evaluation=math.ceil(job.evaluated / ranks) * unit.evaluation,
    )


def best_overlap(
    job: Job, unit: UnitSeconds, ranks: int, link: Callable[[int], Link]
) -> SimulatedRun:
    """Returns the fastest of the overlapped runs of two or more ranks. link: of so many ranks."""
    whole = link(ranks)
    return min(
        (side_by_side(job, unit, ranks, k, link(ranks - k), whole=whole) for k in range(1, ranks)),
        key=lambda run: run.seconds,
    )


def efficiency(
    job: Job, unit: UnitSeconds, run: SimulatedRun, link: Callable[[int], Link]
) -> float:
    """Returns one rank's seconds over the rank-seconds of a run."""
    return in_turns(job, unit, 1, link(1)).seconds / (run.ranks * run.seconds)


def _making(samples: int, each: float, batch: int, ranks: int) -> float:
    return math.ceil(math.ceil(samples / batch) / ranks) * batch * each


def _step(job: Job, unit: UnitSeconds, ranks: int, link: Link) -> float:
    compute = unit.step + unit.image * math.ceil(job.batch_size / ranks)
    return step_seconds(
        compute * slowest(unit.spread, ranks), link.all_reduce(unit.gradients, ranks)
    )
