"""The seconds of a whole run, without its work: rounds, evaluations, checkpoints, and ranks that
are not equally fast.

The stages' seconds are those of a plan (``dpfast.planning.plan``). What decides is the code of a
run: the patience asks for samples (on accuracies that never rise, so as early and as often as it
can), or ``add_at`` does, ``CheckpointTimer`` for checkpoints, and ranks wait for each other by
their heartbeats. Only the clock and the store are simulated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dpfast.config import AT_ONCE, Recipe
from dpfast.parallel import RankError, Ranks
from dpfast.parallel.heartbeat import TIMEOUT, Clock, Heartbeat
from dpfast.planning.disk import WRITTEN
from dpfast.planning.network import link_of, step_seconds
from dpfast.planning.plan import Plan
from dpfast.practice.background import CheckpointTimer
from dpfast.practice.patience import Patience

COPY = 20e9  # bytes/s from a GPU into pinned memory, PCIe 4.0 (stated)
LOOKS = 5.0  # seconds that a simulated rank sleeps at least between two looks at the others
SLOWER = 0.5  # how much slower than the others one rank may be, and the run goes on


@dataclass
class Timeline:
    """The timeline of a run.

    Attributes:
        seconds: Seconds of the run.
        rounds: Seconds of each round of samples.
        evaluations: Number of evaluations.
        interval: Seconds between two evaluations.
        checkpoints: Number of checkpoints.
        checkpoint_bytes: Bytes of one checkpoint.
        waited: Seconds that the loop waited for checkpoints.
        lost: The most seconds of training that a kill costs.
        quiet: The most seconds in which a rank tells nothing.
        dead: Words of a rank about another that is ``SLOWER``; None where all goes on.
    """

    seconds: float = 0.0
    rounds: list[float] = field(default_factory=list)
    evaluations: int = 0
    interval: float = 0.0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    waited: float = 0.0
    lost: float = 0.0
    quiet: float = 0.0
    dead: str | None = None

    @property
    def written(self) -> int:
        """The bytes of all checkpoints."""
        return self.checkpoints * self.checkpoint_bytes


class SimulatedClock(Clock):
    """Seconds that pass when somebody sleeps, or says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += max(seconds, LOOKS)


class _Others:
    """A store in which the other ranks count batches as time passes, and say at their end that they
    are ready.
    """

    def __init__(self, clock: SimulatedClock, batch: Sequence[float], batches: int) -> None:
        self.clock = clock
        self.batch = batch
        self.batches = batches

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: Collection[str]) -> bool:
        return all(self._ready(key) for key in keys)

    def _ready(self, key: str) -> bool:
        name, rank = key.split("/")
        return name == "beat" or self.clock.now() >= self.batch[int(rank)] * self.batches

    def get(self, key: str) -> bytes:
        return str(int(self.clock.now() / self.batch[int(key.split("/")[1])])).encode()

    def multi_get(self, keys: Collection[str]) -> list[bytes]:
        return [b"null" for _ in keys]

    def delete_key(self, key: str) -> bool:
        return True


def outwaits(
    count: int, batch: float, batches: int, *, timeout: float = TIMEOUT, slower: float = SLOWER
) -> str | None:
    """Returns the first rank's words at the end of a round, while the last one is ``slower`` by
    this part; None: it waits.

    batch: seconds of a batch; batches: of every rank.
    """
    if count == 1:
        return None
    clock = SimulatedClock()
    store = _Others(clock, [batch] * (count - 1) + [batch * (1 + slower)], batches)
    ranks = Ranks(0, count, heartbeat=Heartbeat(store, 0, count, timeout, clock), store=store)
    clock.seconds = batch * batches
    try:
        ranks.ready()
    except RankError as error:
        return str(error)
    return None


def timeline(
    recipe: Recipe, plan: Plan, *, saves: float, checkpoint_bytes: int, timeout: float
) -> Timeline:
    """Simulates the whole run of a recipe on a plan's devices, of the source "dp" or, without it,
    the first one.

    saves: seconds for which the loop waits at a checkpoint; checkpoint_bytes: of one; timeout: of
    the run.
    """
    practice = recipe.practice
    unit = plan.unit
    count = plan.count
    link = link_of(plan.device, count)
    batch, size = recipe.generator.batch_size, recipe.learner.batch_size
    step = step_seconds(
        unit.step + unit.image * -(-size // count), link.all_reduce(unit.gradients, count)
    )
    evaluations = practice.evaluations(size)
    evaluation = unit.evaluation * plan.job.evaluated / max(len(evaluations), 1) / count
    clock = SimulatedClock()
    timer = CheckpointTimer(practice.checkpoint_share, practice.checkpoint_minutes, clock.now)
    patience = Patience(practice.patience, practice.initial_samples, practice.patience_growth)
    line = Timeline(interval=practice.interval(size) * step, checkpoint_bytes=checkpoint_bytes)
    took = checkpoint_bytes / WRITTEN
    newest = 0.0

    def save() -> None:
        nonlocal newest
        line.lost, newest = max(line.lost, clock.seconds - newest), clock.seconds
        timer.begun()
        timer.took(took)
        clock.seconds += saves
        line.waited += saves
        line.checkpoints += 1

    def make(samples: int, each: float) -> None:
        nonlocal newest
        batches = math.ceil(math.ceil(samples / batch) / count)
        line.rounds.append(batches * batch * each)
        line.quiet = max(line.quiet, batch * each)
        if line.rounds[-1] == max(line.rounds):
            line.dead = line.dead or outwaits(count, batch * each, batches, timeout=timeout)
        clock.seconds += line.rounds[-1]
        newest = clock.seconds  # samples are saved while they are made
        save()

    source = "dp" if "dp" in practice.sources else practice.sources[0]  # the one that is walked
    later = unit.guided if source == "dp" else unit.unguided + unit.evaluation
    surplus = practice.oversample if source == "prune" else 1.0
    pool = practice.most_samples if source in AT_ONCE else practice.initial_samples
    save()
    make(pool, unit.unguided)
    done = 0
    warm = practice.iterations * recipe.learner.warmup
    for reached in evaluations:
        clock.seconds += (reached - done) * step + evaluation
        done = reached
        line.evaluations += 1
        due = done > warm and patience.update(0.0, pool)
        if practice.add_at:
            due = done in practice.add_at
        left = min(practice.round_samples, practice.most_samples - pool)
        if due and left > 0 and not recipe.learner.cooling_at(done, practice.iterations):
            save()
            make(int(surplus * left), later)
            pool += left
            patience.added()
        elif timer.due() or timer.overdue():
            save()
    line.quiet = max(line.quiet, step, evaluation)
    line.seconds = clock.seconds + (practice.iterations - done) * step
    return line
