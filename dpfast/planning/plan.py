"""A recipe on a number of devices: hours and samples per second of each phase, memory, and what
limits them.

    plan(Recipe.load("imagenet1k-sd15"), "h100", count=8)

A phase takes its FLOPs over the peak of its dtype, or its bytes over the bandwidth, whichever is
longer, divided by the utilisation. Training is data-parallel: the sum of gradients over all devices
runs beside the backward pass (``dpfast.planning.network``). Where the stages were timed
(``dpfast.planning.measure``), the plan goes by those times.

The plan is for a run that adds as many samples as it may (``Practice.most_samples``); one that
stops earlier costs less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpfast.config import SOURCES, Recipe
from dpfast.data.class_counts import check_total
from dpfast.data.real import count_real, count_training
from dpfast.errors import InputError
from dpfast.hardware.flops import Counts
from dpfast.hardware.peaks import Peaks, peaks_named
from dpfast.planning.disk import Disk, plan_disk
from dpfast.planning.fitting import Fit, fit, stages_of
from dpfast.planning.measure import Timings
from dpfast.planning.network import link_of, step_seconds
from dpfast.planning.simulation import (
    Job,
    SimulatedRun,
    UnitSeconds,
    best_overlap,
    efficiency,
    in_turns,
    job_of,
)
from dpfast.planning.stages import Stages
from dpfast.pool.importing import saved_pool
from dpfast.pool.rank_folders import saved_folders
from dpfast.pool.shards import Manifest
from dpfast.sources.reuse import count_known

# Of the limit, by the makers' peaks. Generation: guided samples of DiT-XL/2 (batch 32) and of
# Stable Diffusion 1.5 (512 px, batch 16) in steps that were not compiled, on one H200
# (docs/records/results.md). The others are stated.
GENERATION = {"transformer": 0.33, "unet": 0.24}
STATED = {"training": 0.4, "evaluation": 0.4}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of a run. units: samples or images of all devices; limit: seconds at 100 %; seconds:
    at the utilisation, or measured.
    """

    source: str
    name: str
    units: int
    counts: Counts
    limited_by: str
    limit: float
    seconds: float

    @property
    def rate(self) -> float:
        """The units per second of all devices together."""
        return self.units / self.seconds if self.seconds else float("inf")

    @property
    def utilisation(self) -> float:
        """The share of the limit that is reached: the seconds at the limit over the seconds."""
        return self.limit / self.seconds if self.seconds else 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe's run on ``count`` devices: phases, memory, and how ranks divide it."""

    recipe: Recipe
    device: Peaks
    count: int
    phases: tuple[Phase, ...]
    stages: Stages
    fit: Fit
    samples: int  # at the end
    timed: tuple[str, ...]  # what was timed, in words; empty: nothing was
    given: bool  # the utilisation was
    job: Job  # of Deliberate Practice
    unit: UnitSeconds

    @property
    def turns(self) -> SimulatedRun:
        """The simulated run in which all ranks make samples, then all train."""
        return in_turns(self.job, self.unit, self.count, link_of(self.device, self.count))

    @property
    def overlap(self) -> SimulatedRun:
        """The fastest one in which a part of two or more ranks makes samples while the others
        train.
        """
        return best_overlap(self.job, self.unit, self.count, partial(link_of, self.device))

    def efficiency(self, run: SimulatedRun) -> float:
        """Returns the seconds of one device over the device-seconds of a simulated run."""
        return efficiency(self.job, self.unit, run, partial(link_of, self.device))

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def disk(self) -> Disk:
        """The bytes that the first source writes; every further one writes as much."""
        first = [phase for phase in self.phases if phase.source == self.phases[0].source]
        training = sum(phase.seconds for phase in first if phase.name in ("training", "evaluation"))
        whole = sum(phase.seconds for phase in first)
        return plan_disk(self.recipe, self.fit.pool, self.stages, self.samples, whole, training)

    @property
    def limit(self) -> float:
        """The seconds of the run with every phase at its limit."""
        return sum(phase.limit for phase in self.phases)

    @property
    def device_hours(self) -> float:
        return self.seconds * self.count / 3600


def plan(
    recipe: Recipe,
    device: Peaks | str,
    *,
    count: int = 1,
    utilisation: float | None = None,
    timings: Timings | None = None,
    samples: int | None = None,
) -> Plan:
    """Plans a recipe on ``count`` devices.

    Args:
        recipe: The recipe.
        device: A name of ``dpfast.hardware.peaks`` or a device.
        count: Number of devices.
        utilisation: Share of every phase's limit, in place of ``GENERATION`` and ``STATED``.
        timings: Measured seconds of the stages on one device, in place of limits.
        samples: Samples at the end of the run, in place of the recipe's maximum.

    Raises:
        InputError: For a count or a utilisation out of range, an unknown device, and a pipeline or
            a learner that cannot be built.
    """
    if count < 1:
        raise InputError(f"count = {count}: expected at least one device")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise InputError(f"utilisation = {utilisation:g}: expected above 0 and at most 1")
    total = most_samples(recipe) if samples is None else samples
    if total < recipe.practice.initial_samples and recipe.practice.generates:
        raise InputError(
            f"samples = {total}: the run begins with {recipe.practice.initial_samples}"
        )
    check_total(recipe.practice)
    device = peaks_named(device) if isinstance(device, str) else device
    stages = stages_of(recipe, device)
    shares = {"generation": GENERATION["transformer" if stages.transformer else "unet"], **STATED}
    if utilisation is not None:
        shares = dict.fromkeys(shares, utilisation)
    phases = tuple(_phases(recipe, stages, device, count, shares, timings, total))
    return Plan(
        recipe=recipe,
        device=device,
        count=count,
        phases=phases,
        stages=stages,
        samples=total,
        fit=fit(recipe, device, count=count, samples=total, stages=stages),
        timed=() if timings is None else timings.notes or ("stages timed on this machine",),
        given=utilisation is not None,
        job=job_of(recipe, total, _evaluated(recipe, stages.classes)),
        unit=_unit_seconds(stages, device, shares, timings),
    )


def most_samples(recipe: Recipe) -> int:
    """Returns samples at the end of a run that adds as many rounds as it may; of one whose samples
    all exist, those that are there, where the folders are.
    """
    practice = recipe.practice
    most = practice.most_samples
    if practice.generates:
        return most
    there = 0
    if "real" in practice.sources:
        there = count_training(practice.real)
    saved = saved_pool(Path(practice.pool_from)) if "pool" in practice.sources else None
    if saved is not None:
        found = sum(Manifest.read(part).samples for part in saved_folders(saved))
        there = max(there, found)
    return min(most, there) if there else most


def _phases(
    recipe: Recipe,
    stages: Stages,
    device: Peaks,
    count: int,
    shares: Mapping[str, float],
    timings: Timings | None,
    total: int,
) -> Iterator[Phase]:
    practice, learner = recipe.practice, recipe.learner
    steps = practice.iterations
    evaluated = _evaluated(recipe, stages.classes)

    def phase(
        source: str, name: str, kind: str, units: int, each: Counts, seconds: float | None
    ) -> Phase:
        limits = device.limits(each * (units / count))
        limited_by = max(limits, key=limits.__getitem__)
        limit = limits[limited_by]
        worked = units * seconds / count if seconds is not None else limit / shares[kind]
        if name == "training":
            reduce = steps * link_of(device, count).all_reduce(stages.learner.gradients, count)
            limit = step_seconds(limit, reduce)
            alone = worked
            worked = step_seconds(worked, reduce)
            limited_by = "network" if worked > alone * (1 + 1e-9) else limited_by  # not by rounding
        return Phase(
            source=source,
            name=name,
            units=units,
            counts=each,
            limited_by=limited_by,
            limit=limit,
            seconds=worked,
        )

    unguided, guided, train, judge = (
        (None,) * 4
        if timings is None
        else (timings.unguided, timings.guided, timings.training, timings.evaluation)
    )
    saved, batch = count_known(recipe), recipe.generator.batch_size
    made = 0  # unguided samples by id are made once and shared
    for source in practice.sources:
        first, more = practice.initial_samples, total - practice.initial_samples
        as_source = practice.mix_with if source == "mix" else source
        needed = {
            "dp": first,
            "static": total,
            "dynamic": total,
            "prune": first + int(practice.oversample * more),
        }.get(as_source, 0)  # what a source of the user's own makes is not known
        real = 0  # in the place of the first ones
        if source == "mix":
            real = practice.mixed_real(total if as_source == "static" else first)
        taken = saved if saved >= needed else saved - saved % batch  # of another run, whole batches
        new = max(0, needed - max(made, real, taken))
        if source in SOURCES:
            yield phase(source, "unguided samples", "generation", new, stages.unguided, unguided)
        made = max(made, needed) if real <= made else made
        if as_source == "dp" and more > 0:
            yield phase(source, "guided samples", "generation", more, stages.guided, guided)
            yield phase(
                source,
                "yardstick",
                "generation",
                practice.yardstick_samples,
                stages.unguided,
                unguided,
            )
        if as_source in ("dynamic", "prune"):
            yield phase(source, "scoring", "evaluation", needed - first, stages.evaluation, judge)
        yield phase(
            source, "training", "training", steps * learner.batch_size, stages.training, train
        )
        yield phase(source, "evaluation", "evaluation", evaluated, stages.evaluation, judge)


def _evaluated(recipe: Recipe, classes: int) -> int:
    """Returns real images in all evaluations of one source, the last one with the held-out ones."""
    validation, test = count_real(recipe.validation, recipe.held_out, classes=classes)
    times = len(recipe.practice.evaluations(recipe.learner.batch_size))
    return (times + 1) * validation + test


def _unit_seconds(
    stages: Stages, device: Peaks, shares: Mapping[str, float], timings: Timings | None
) -> UnitSeconds:
    """Returns seconds of one unit of each stage on one device."""

    def derived(counts: Counts, kind: str) -> float:
        return max(device.limits(counts).values()) / shares[kind]

    def seconds(name: str, counts: Counts, kind: str) -> float:
        timed: float | None = getattr(timings, name, None)
        return derived(counts, kind) if timed is None else timed

    return UnitSeconds(
        unguided=seconds("unguided", stages.unguided, "generation"),
        guided=seconds("guided", stages.guided, "generation"),
        image=seconds("training", stages.training, "training"),
        evaluation=seconds("evaluation", stages.evaluation, "evaluation"),
        gradients=stages.learner.gradients,
    )
