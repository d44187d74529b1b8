"""``rehearse``: a recipe at its true size on devices that are not there, and everything that would
go wrong.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpfast.config import Pool, Recipe
from dpfast.data.class_counts import class_counts
from dpfast.data.real import count_real
from dpfast.generate.from_recipe import class_names
from dpfast.hardware.peaks import NODE
from dpfast.parallel.heartbeat import TIMEOUT
from dpfast.parallel.recorder import CollectiveRecorder
from dpfast.planning.architectures import PIXELS, pipeline_of
from dpfast.planning.disk import WRITTEN
from dpfast.planning.memory import usable
from dpfast.planning.plan import Plan, plan
from dpfast.pool.memory_tiers import readable
from dpfast.pool.record import RECORD
from dpfast.rehearsal.device import FakeDevice, PhaseMemory, Wait
from dpfast.rehearsal.dry_run import MOST as DRY_RUN
from dpfast.rehearsal.dry_run import dry_run_seconds
from dpfast.rehearsal.ranks import ranks_of
from dpfast.rehearsal.timeline import COPY, Timeline, timeline
from dpfast.rehearsal.walk import walk

# bytes of host memory of a process beside what is counted: Python, torch, CUDA, NCCL (stated)
PROCESS = 4e9


@dataclass(frozen=True, kw_only=True)
class Walked:
    """One rank's walk, with what ``dpfast.rehearsal.walk.Account`` says.

    collectives: (group, kind, bytes) in their order; device_groups: the groups that moved what lies
    on the device.
    """

    rank: int
    phases: dict[str, PhaseMemory]
    waits: tuple[Wait, ...]
    captures: int
    alive: int
    checkpoint_bytes: int
    copied: int
    written: int
    collectives: tuple[tuple[str, str, int], ...]
    device_groups: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The findings of a rehearsal.

    host: bytes of a node's memory, by kind; dry_run: seconds in which ``--dry-run`` times the
    stages; failures: in words; empty where a run would go from start to end.
    """

    recipe: Recipe
    plan: Plan
    walks: tuple[Walked, ...]
    timeline: Timeline
    host: dict[str, float]
    dry_run: float
    failures: tuple[str, ...] = ()

    @property
    def peak(self) -> tuple[str, PhaseMemory]:
        """The phase that holds most of the first rank's device, and what."""
        return max(self.walks[0].phases.items(), key=lambda named: named[1].peak)

    @property
    def margin(self) -> float:
        """The bytes of a device that may be used and are not: by the tensors that were counted."""
        return usable(self.plan.device) - self.peak[1].peak


def _check_counts(recipe: Recipe) -> None:
    """Raises ``InputError`` where ``class_counts`` do not fit the classes, as far as their names
    are known: a published architecture has none.
    """
    names = class_names(recipe.generator)
    if names is None and recipe.generator.pipeline not in PIXELS:
        names = pipeline_of(recipe.generator).class_names
    if names is not None:
        class_counts(recipe.practice, names)


def rehearse(
    recipe: Recipe,
    device: str,
    *,
    count: int = 1,
    timeout: float = TIMEOUT,
    disk: float | None = None,
    ranks: int = 2,
) -> Rehearsal:
    """Walks a recipe through ``count`` devices of a kind, as ``dpfast run`` would adapt it to them.

    Args:
        recipe: The recipe.
        device: A name of ``dpfast.hardware.peaks``.
        count: Number of devices.
        timeout: Timeout of the run in seconds (``--timeout``).
        disk: Bytes that are free where the run's folder is; None: not asked.
        ranks: Number of ranks that are walked, from the first and the last one on; one is enough
            for memory, the second holds the order of the collectives.

    Raises:
        InputError: For an unknown device, and for a recipe that cannot be planned.
    """
    planned = plan(recipe, device, count=count)
    _check_counts(recipe)
    chosen = sorted({0, count - 1} if ranks > 1 else {0})
    walks = tuple(walked(planned, rank) for rank in chosen)
    first = walks[0]
    saves = first.copied / COPY + first.written / WRITTEN
    line = timeline(
        recipe, planned, saves=saves, checkpoint_bytes=first.checkpoint_bytes, timeout=timeout
    )
    host = host_memory(recipe, planned)
    found = Rehearsal(
        recipe=planned.fit.recipe,
        plan=planned,
        walks=walks,
        timeline=line,
        host=host,
        dry_run=dry_run_seconds(planned),
    )
    return replace(found, failures=tuple(_failures(found, timeout, disk)))


def walked(planned: Plan, rank: int) -> Walked:
    """Returns the walk of one rank, with what the plan fitted, and its part of the pool on the
    device all the time.
    """
    recipe = planned.fit.recipe
    pool = planned.fit.pool
    held = int(pool.in_tier["device"] * pool.bytes_per_sample)
    walk = _walked(
        json.dumps(replace(recipe, pool=Pool(codec=recipe.pool.codec)).to_dict()),
        planned.count,
        rank,
    )
    phases = {
        name: PhaseMemory(
            memory.peak + held, {**memory.kinds, "pool": held + memory.kinds.get("pool", 0)}
        )
        for name, memory in walk.phases.items()
    }
    return replace(walk, phases=phases)


@functools.lru_cache(maxsize=64)
def _walked(recipe: str, count: int, rank: int) -> Walked:
    """Returns the walk of one rank. Devices differ in what fits, not in what a walk is: the same
    batches on another device are walked once.
    """
    recorder, device = CollectiveRecorder(), FakeDevice()
    carried: set[str] = set()
    ranks = ranks_of(count, rank, NODE, recorder, carried)
    account = walk(Recipe.from_dict(json.loads(recipe)), ranks, device)
    return Walked(
        rank=rank,
        phases={
            name: memory for name, memory in device.phases.items() if not name.endswith("start")
        },
        waits=tuple(device.waits),
        captures=account.captures,
        alive=account.alive,
        checkpoint_bytes=account.checkpoint_bytes,
        copied=account.copied,
        written=account.written,
        collectives=tuple(recorder.order),
        device_groups=frozenset(carried),
    )


def host_memory(recipe: Recipe, planned: Plan) -> dict[str, float]:
    """Returns bytes of a node's host memory that a run takes, by kind."""
    pool, here = planned.fit.pool, min(NODE, planned.count)
    validation, test = count_real(
        recipe.validation, recipe.held_out, classes=planned.stages.classes
    )
    return {
        "processes": PROCESS * here,
        "pool": float(pool.in_tier["host"] * pool.bytes_per_sample) * here,
        "columns": float(pool.samples * RECORD.itemsize) * here,
        "real images": (validation + test) / planned.count * here * math.prod(planned.stages.image),
        "checkpoint": 2.0 * planned.stages.learner.state,
    }


def _failures(found: Rehearsal, timeout: float, disk: float | None) -> Iterator[str]:
    recipe = found.recipe
    planned = found.plan
    walks = found.walks
    line = found.timeline
    host = found.host
    device, first = planned.device, walks[0]
    limit, here = usable(device), min(NODE, planned.count)
    for name, memory in first.phases.items():
        if memory.peak > limit:
            kinds = ", ".join(f"{kind} {readable(size)}" for kind, size in _largest(memory.kinds))
            yield f"memory: {name} holds {readable(memory.peak)} of {readable(limit)} ({kinds})"
    if planned.fit.margin < 0:
        peak = planned.fit.peak
        yield (
            f"memory: {peak.phase} takes {readable(peak.total)} of {readable(limit)} with the "
            "allocator's reserve"
        )
    if not planned.fit.pool.fits:
        yield f"pool: {planned.fit.pool}"
    if device.host is not None and sum(host.values()) > device.host * here:
        yield (
            f"host memory: a node's ranks take {readable(sum(host.values()))} of "
            f"{readable(device.host * here)}"
        )
    if first.alive:
        yield f"memory: {first.alive} captured graphs are alive while the learner trains"
    for wait, times in Counter(w for w in first.waits if w.in_step).items():
        yield (
            f"waits: a step waits for the host {times} times in {wait.phase}: {wait.operation} "
            f"({wait.where})"
        )
    for other in walks[1:]:
        if _kinds(other) != _kinds(first)[: len(other.collectives)]:
            yield (
                f"collectives: rank {other.rank} calls them in another order than rank {first.rank}"
            )
    if len(first.device_groups) > 1:
        groups = ", ".join(sorted(first.device_groups))
        yield (
            f"collectives: the groups {groups} move data "
            "of the device and may be in flight together"
        )
    if line.dead is not None:
        yield f"ranks: {line.dead}"
    if line.quiet > timeout:
        yield f"ranks: a rank tells nothing for {line.quiet:.0f} s, more than --timeout {timeout:g}"
    share = line.waited / max(line.seconds, 1e-9)
    if share > recipe.practice.checkpoint_share:
        yield f"checkpoints: the loop waits {share:.1%} of the run for {line.checkpoints} of them"
    if disk is not None and planned.disk.total > disk:
        yield f"disk: the run writes {readable(planned.disk.total)}, free are {readable(disk)}"
    if found.dry_run > DRY_RUN:
        yield (
            f"dry run: times the stages for {found.dry_run:.0f} "
            f"s on this device, more than {DRY_RUN:.0f}"
        )


def _kinds(walk: Walked) -> list[tuple[str, str]]:
    """Returns the kinds of collectives in the order that all ranks share; what each sends
    differs.
    """
    return [(group, kind) for group, kind, _ in walk.collectives]


def _largest(kinds: dict[str, int], most: int = 4) -> list[tuple[str, int]]:
    return sorted(((k, v) for k, v in kinds.items() if v > 1 << 20), key=lambda pair: -pair[1])[
        :most
    ]
