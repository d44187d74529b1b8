"""A recipe on a number of devices: hours and samples per second of each phase, memory, and what limits them.

    plan(Recipe.load("imagenet1k-sd15"), "h100", count=8)

A phase takes its FLOPs over the peak of its dtype, or its bytes over the bandwidth, whichever is longer, divided by the
utilisation. Training is data-parallel: the sum of gradients over all devices runs beside the backward pass
(``dpfast.roofline.network``). Where the stages were timed (``dpfast.roofline.measure``), the plan goes by those times.

The plan is for a run that adds samples until ``maximum_samples``; one that stops earlier costs less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dpfast.config import Recipe, RecipeError
from dpfast.data.real import count_real
from dpfast.generate.recipes import class_names, resized
from dpfast.generate.runtime.regional import has_region
from dpfast.pool import codecs
from dpfast.pool.plan import Plan as PoolPlan
from dpfast.pool.plan import plan as plan_pool
from dpfast.pool.tiers import DEVICE_SHARE, FILE_SHARE, GIB, HOST_SHARE, Tiers
from dpfast.practice import yardstick
from dpfast.roofline import devices
from dpfast.roofline.architectures import without_weights
from dpfast.roofline.counting import Counts
from dpfast.roofline.devices import Device
from dpfast.roofline.measure import Timings
from dpfast.roofline.network import link_of, step_seconds
from dpfast.roofline.schedule import Costs, Job, Schedule, best_overlap, efficiency, in_turns, job_of
from dpfast.roofline.stages import Stages, count_stages

# Of the limit, by the makers' peaks. Generation: guided samples of DiT-XL/2 (batch 32) and of Stable Diffusion 1.5
# (512 px, batch 16) in steps that were not compiled, on one H200 (docs/results.md). The others are stated.
GENERATION = {"transformer": 0.33, "unet": 0.24}
STATED = {"training": 0.4, "evaluation": 0.4}
LEARNER_MEMORY = 0.9  # of a device's memory that weights, activations and pool may take together


@dataclass(frozen=True, kw_only=True)
class Phase:
    """units: samples or images of all devices; limit: seconds at 100 %; seconds: at the utilisation, or measured."""

    source: str
    name: str
    units: int
    counts: Counts
    limited_by: str
    limit: float
    seconds: float

    @property
    def rate(self) -> float:
        """Units per second of all devices together."""
        return self.units / self.seconds if self.seconds else float("inf")

    @property
    def utilisation(self) -> float:
        """Of the limit."""
        return self.limit / self.seconds if self.seconds else 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``dpfast plan`` prints. Memory is of one device, bytes."""

    recipe: Recipe
    device: Device
    count: int
    phases: tuple[Phase, ...]
    stages: Stages
    pool: PoolPlan
    measured: bool  # stages were timed
    given: bool  # the utilisation was
    job: Job  # of Deliberate Practice
    costs: Costs

    @property
    def turns(self) -> Schedule:
        """The simulated schedule in which all ranks make samples, then all train."""
        return in_turns(self.job, self.costs, self.count, link_of(self.device, self.count))

    @property
    def overlap(self) -> Schedule:
        """The fastest one in which a part of two or more ranks makes samples while the others train."""
        return best_overlap(self.job, self.costs, self.count, partial(link_of, self.device))

    def efficiency(self, schedule: Schedule) -> float:
        """Of a simulated schedule: the seconds of one device over the device-seconds of it."""
        return efficiency(self.job, self.costs, schedule, partial(link_of, self.device))

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def limit(self) -> float:
        """Seconds at 100 %."""
        return sum(phase.limit for phase in self.phases)

    @property
    def device_hours(self) -> float:
        return self.seconds * self.count / 3600

    @property
    def sampling_memory(self) -> float:
        """Weights of generator and learner and the dearest step of a whole batch."""
        fixed, each = self.stages.sampling_bytes
        return self.stages.weights + self.stages.state + fixed + each * self.recipe.generator.generation_batch

    @property
    def training_memory(self) -> float:
        """The same weights and a training step of this device's share of the batch."""
        fixed, each = self.stages.training_bytes
        share = -(-self.recipe.learner.batch_size // self.count)
        return self.stages.weights + self.stages.state + fixed + each * share

    @property
    def largest_batch(self) -> int:
        """The most samples of a guided batch that a device's memory holds beside weights and its part of the pool."""
        fixed, each = self.stages.sampling_bytes
        held = self.stages.weights + self.stages.state + self.pool.places["device"] * self.pool.bytes_per_sample
        return max(0, int((self.device.memory * LEARNER_MEMORY - held - fixed) // each))


def plan(
    recipe: Recipe,
    device: Device | str,
    *,
    count: int = 1,
    utilisation: float | None = None,
    timings: Timings | None = None,
    samples: int | None = None,
) -> Plan:
    """Plans a recipe.

    Args:
        device: a name of ``dpfast.roofline.devices`` or a device; count: how many of them.
        utilisation: of every phase's limit, in place of ``GENERATION`` and ``STATED``.
        timings: measured seconds of the stages on one device, in place of limits.
        samples: at the end of the run, in place of the recipe's maximum.

    Raises ``RecipeError`` for a count or a utilisation out of range, an unknown device, a pipeline or a learner that
    cannot be built.
    """
    if count < 1:
        raise RecipeError(f"count = {count}: at least one device")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise RecipeError(f"utilisation = {utilisation:g}: above 0 and at most 1")
    total = recipe.practice.maximum_samples if samples is None else samples
    if total < recipe.practice.initial_samples:
        raise RecipeError(f"samples = {total}: the run begins with {recipe.practice.initial_samples}")
    device = devices.device(device) if isinstance(device, str) else device
    generator, learner = recipe.generator, recipe.learner
    names = class_names(generator)
    pipeline = without_weights(
        generator.pipeline, classes=None if names is None else len(names), dtype=getattr(torch, generator.dtype)
    )
    pipeline = resized(pipeline, generator.image_size)
    half = learner.precision == "bf16" or (learner.precision == "auto" and device.half > device.full)
    try:
        stages = count_stages(recipe, pipeline, half_training=half)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    shares = {"generation": GENERATION["transformer" if has_region(pipeline.denoiser) else "unet"], **STATED}
    if utilisation is not None:
        shares = dict.fromkeys(shares, utilisation)
    phases = tuple(_phases(recipe, stages, device, count, shares, timings, total, pipeline.denoiser.classes))
    return Plan(
        recipe=recipe,
        device=device,
        count=count,
        phases=phases,
        stages=stages,
        pool=place_pool(recipe, total, stages, device, count),
        measured=timings is not None,
        given=utilisation is not None,
        job=job_of(recipe, total, _evaluated(recipe, pipeline.denoiser.classes)),
        costs=_costs(stages, device, shares, timings),
    )


def _phases(
    recipe: Recipe,
    stages: Stages,
    device: Device,
    count: int,
    shares: Mapping[str, float],
    timings: Timings | None,
    total: int,
    classes: int,
) -> Iterator[Phase]:
    practice, learner = recipe.practice, recipe.learner
    steps = practice.iterations
    evaluated = _evaluated(recipe, classes)

    def phase(source: str, name: str, kind: str, units: int, each: Counts, seconds: float | None) -> Phase:
        limits = device.limits(each * (units / count))
        limited_by = max(limits, key=limits.__getitem__)
        limit = limits[limited_by]
        worked = units * seconds / count if seconds is not None else limit / shares[kind]
        if name == "training":
            reduce = steps * link_of(device, count).all_reduce(4 * stages.parameters, count)
            limit, alone, worked = step_seconds(limit, reduce), worked, step_seconds(worked, reduce)
            limited_by = "network" if worked > alone else limited_by
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
        (None,) * 4 if timings is None else (timings.unguided, timings.guided, timings.training, timings.evaluation)
    )
    made = 0  # unguided samples by id are made once and shared
    for source in ("dp", "static", "prune", "dynamic"):
        if source not in practice.sources:
            continue
        first, more = practice.initial_samples, total - practice.initial_samples
        needed = {
            "dp": first,
            "static": total,
            "dynamic": total,
            "prune": first + int(practice.oversample * more),
        }[source]
        new = max(0, needed - made)
        yield phase(source, "unguided samples", "generation", new, stages.unguided, unguided)
        made = max(made, needed)
        if source == "dp" and more > 0:
            yield phase(source, "guided samples", "generation", more, stages.guided, guided)
            yield phase(source, "yardstick", "generation", yardstick.SAMPLES, stages.unguided, unguided)
        if source in ("dynamic", "prune"):
            yield phase(source, "scoring", "evaluation", needed - first, stages.evaluation, judge)
        yield phase(source, "training", "training", steps * learner.batch_size, stages.training, train)
        yield phase(source, "evaluation", "evaluation", evaluated, stages.evaluation, judge)


def _evaluated(recipe: Recipe, classes: int) -> int:
    """Real images in all evaluations of one source, the last one with the held-out ones."""
    validation, test = count_real(recipe.validation, recipe.held_out, classes=classes)
    times = recipe.practice.iterations // recipe.practice.interval(recipe.learner.batch_size)
    return (times + 1) * validation + test


def _costs(stages: Stages, device: Device, shares: Mapping[str, float], timings: Timings | None) -> Costs:
    """Seconds of one unit of each stage on one device."""

    def derived(counts: Counts, kind: str) -> float:
        return max(device.limits(counts).values()) / shares[kind]

    timings = timings or Timings(
        unguided=derived(stages.unguided, "generation"),
        guided=derived(stages.guided, "generation"),
        training=derived(stages.training, "training"),
        evaluation=derived(stages.evaluation, "evaluation"),
    )
    return Costs(
        unguided=timings.unguided,
        guided=timings.guided,
        image=timings.training,
        evaluation=timings.evaluation,
        gradients=4 * stages.parameters,
    )


def place_pool(recipe: Recipe, samples: int, stages: Stages, device: Device, count: int) -> PoolPlan:
    """Where the samples lie, by a run's shares: what weights leave of a device, of a node's memory, of its drives."""
    config = recipe.pool
    shape = stages.latent if config.codec == "latents" else stages.image
    on_gpu = device.half > device.full
    free = (device.memory - stages.weights - stages.state) * DEVICE_SHARE
    budget = max(0, free if config.device_gib is None else config.device_gib * GIB) if on_gpu else 0
    host = device.host and device.host * HOST_SHARE if config.host_gib is None else config.host_gib * GIB
    tiers = Tiers.detect(folder=Path() if config.mapped else None, host_bytes=None if host is None else int(host))
    tiers = replace(tiers, device=torch.device("cuda") if budget else None, device_bytes=int(budget))
    if config.mapped and device.disk is not None:
        tiers = replace(tiers, file_bytes=int(device.disk * FILE_SHARE))
    codecs.check_codec(config.codec)
    return plan_pool(samples, shape, config.codec, count, tiers=tiers)
