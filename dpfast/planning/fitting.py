"""A recipe fitted to the memory of its devices: micro-batch, batch of samples and the pool's place.

    fitted = fit(Recipe.load("imagenet1k-sd15"), "h100", count=8)
    fitted.recipe, fitted.lines()

What is always there comes first, then batches as large as the recipe names them, in equal parts
where a whole one does not fit, and the pool takes what they leave, at most what the recipe gives
it. None of the three changes a sample, and a micro-batch changes a gradient by its rounding alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpfast.config import Recipe
from dpfast.data.folders import BATCH
from dpfast.errors import InputError
from dpfast.generate.pipelines.pipeline import FLOAT8
from dpfast.hardware.peaks import DEVICES, Peaks, peaks_named
from dpfast.planning.architectures import pipeline_of
from dpfast.planning.memory import (
    Footprint,
    evaluation_bytes,
    footprints,
    sampling_bytes,
    training_bytes,
    usable,
)
from dpfast.planning.stages import Stages, count_stages
from dpfast.pool import codecs
from dpfast.pool.memory_tiers import DEVICE_SHARE, FILE_SHARE, GIB, MemoryTiers, readable
from dpfast.pool.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The memory that a recipe takes of each device, and the fields that had to change.

    recipe: with the batches and the pool's budget that fit. generator_micro_batch: samples that are
    made at once; the generator's batch_size stays, it says which rank makes what.
    learner_micro_batch: images in one forward and backward pass. evaluation_batch_size: images that
    the learner predicts at once. usable: bytes of a device. changes: in words; proposals: options
    with which it would fit where it does not.
    """

    recipe: Recipe
    device: Peaks
    count: int
    learner_micro_batch: int
    generator_micro_batch: int
    evaluation_batch_size: int
    pool: Placement
    phases: tuple[Footprint, ...]
    usable: float
    changes: tuple[str, ...]
    proposals: tuple[str, ...]

    @property
    def peak(self) -> Footprint:
        """The phase that holds most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def margin(self) -> float:
        """The bytes that are left at the peak; below 0 where it does not fit."""
        return self.usable - self.peak.total

    @property
    def fits(self) -> bool:
        return self.margin >= 0 and self.pool.fits

    def lines(self) -> list[str]:
        """Returns lines of text: the peak and its margin, then what was changed and what is
        proposed.
        """
        kind = "margin" if self.margin >= 0 else "missing"
        first = (
            f"memory: at most {readable(self.peak.total)} of the {readable(self.usable)} of a "
            "device that may be used "
            f"({self.peak.phase}), {kind} {readable(abs(self.margin))}"
        )
        return [
            first,
            *(f"  adapted: {change}" for change in self.changes),
            *(f"  try: {p}" for p in self.proposals),
        ]


def fit(
    recipe: Recipe,
    device: Peaks | str,
    *,
    count: int = 1,
    samples: int | None = None,
    stages: Stages | None = None,
) -> Fit:
    """Fits a recipe to ``count`` peaks.

    samples: of the pool at the end, in place of the recipe's maximum; stages: where they were
    counted already.

    Raises ``InputError`` for an unknown device, and for a pipeline or a learner that cannot be
    counted.
    """
    device = peaks_named(device) if isinstance(device, str) else device
    stages = stages or stages_of(recipe, device)
    total = recipe.practice.most_samples if samples is None else samples
    config, wanted = recipe.learner, recipe.generator.batch_size
    asked, share = recipe.generator.at_once, math.ceil(config.batch_size / count)
    generates = recipe.practice.generates
    guided = recipe.practice.guides and total > recipe.practice.initial_samples
    limit, always = usable(device), float(stages.weights + stages.learner.state)
    if not device.gpu:  # a CPU's pool is in the same memory, and goes nowhere else
        always += _held(place_pool(recipe, total, stages, device, count), device)

    def samples_fit(batch: int) -> bool:
        kinds = (False, True) if guided else (False,)
        held = max(sampling_bytes(stages, device, batch, guided=kind) for kind in kinds)
        return always + held <= limit

    def step_fits(micro: int) -> bool:
        return (
            always + training_bytes(stages, device, share=share, micro_batch=micro, ranks=count)
            <= limit
        )

    def evaluation_fits(images: int) -> bool:
        return always + stages.learner.gradients + evaluation_bytes(stages, device, images) <= limit

    batch = equal_part(wanted, lambda size: size <= asked and samples_fit(size))
    most = share if config.micro_batch is None else min(share, config.micro_batch)
    micro = equal_part(share, lambda size: size <= most and step_fits(size), even=True)
    evaluated = equal_part(BATCH, evaluation_fits)
    changes = []
    if batch < asked:
        recipe = replace(recipe, generator=replace(recipe.generator, micro_batch=batch))
        changes.append(f"samples are made {batch} at once, not {asked} (generator.micro_batch)")
    if micro < most:
        recipe = replace(recipe, learner=replace(config, micro_batch=micro))
        changes.append(
            f"a training step takes its {share} images in micro-batches of {micro} "
            "(learner.micro_batch)"
        )

    def phases(pool: float) -> tuple[Footprint, ...]:
        return footprints(
            stages,
            device,
            pool=pool,
            batch=batch,
            share=share,
            micro_batch=micro,
            evaluated=evaluated,
            ranks=count,
            generates=generates,
            guided=guided,
        )

    pool = place_pool(recipe, total, stages, device, count)
    room = max(0.0, limit - max(phase.total for phase in phases(0.0)))
    if device.gpu and _held(pool, device) > room:
        recipe = replace(
            recipe, pool=replace(recipe.pool, device_gib=int(1000 * room / GIB) / 1000)
        )
        less = place_pool(recipe, total, stages, device, count)
        taken, planned = (readable(_held(each, device)) for each in (less, pool))
        changes.append(f"the pool takes {taken} of a device, not {planned} (device_gib)")
        pool = less
    return Fit(
        recipe=recipe,
        device=device,
        count=count,
        learner_micro_batch=micro,
        generator_micro_batch=batch,
        evaluation_batch_size=evaluated,
        pool=pool,
        phases=phases(_held(pool, device)),
        usable=limit,
        changes=tuple(changes),
        proposals=_proposals(recipe, pool),
    )


def equal_part(whole: int, fits: Callable[[int], bool], *, even: bool = False) -> int:
    """Returns the size of the fewest equal parts of ``whole`` that fit, the last one smaller unless
    ``even``; 1 where none.
    """
    sizes = (-(-whole // parts) for parts in range(1, whole + 1) if not even or whole % parts == 0)
    return next((size for size in sizes if fits(size)), 1)


def _held(pool: Placement, device: Peaks) -> float:
    """Returns bytes of the pool's part in a device's own memory."""
    held = pool.in_tier["device"] + (0 if device.gpu else pool.in_tier["host"])
    return float(held * pool.bytes_per_sample)


def _proposals(recipe: Recipe, pool: Placement) -> tuple[str, ...]:
    """Names the options that would make a pool fit which does not."""
    if pool.fits:
        return ()
    held = pool.devices * sum(pool.in_tier.values())
    ways = [f"--maximum-samples {held}, which the memory and the disk of the devices hold"]
    if recipe.pool.codec == "pixels":
        ways.append("--codec jpeg, about a tenth of the bytes")
    if not recipe.pool.mapped:
        ways.append("--mapped true, which takes the disk as well")
    return tuple(ways)


def place_pool(
    recipe: Recipe, samples: int, stages: Stages, device: Peaks, count: int
) -> Placement:
    """Places the samples by a run's shares: what weights leave of a device, of a node's memory, of
    its drives.
    """
    config = recipe.pool
    shape = stages.latent if config.codec == "latents" else stages.image
    free = (
        device.memory - stages.weights - stages.learner.state - stages.learner.gradients
    ) * DEVICE_SHARE
    budget = (
        (max(0, free) if device.gpu else 0)
        if config.device_gib is None
        else config.device_gib * GIB
    )
    tiers = MemoryTiers.detect(
        torch.device("cuda" if device.gpu else "cpu"),
        Path() if config.mapped else None,
        device_bytes=int(budget),
        host_bytes=None if config.host_gib is None else int(config.host_gib * GIB),
        free=device.host,
    )
    if config.mapped and device.disk is not None:
        tiers = replace(tiers, file_bytes=int(device.disk * FILE_SHARE))
    codecs.check_codec(config.codec)
    return Placement.of(samples, shape, config.codec, count, tiers=tiers)


def stages_of(recipe: Recipe, device: Peaks) -> Stages:
    """Returns the counted stages of a recipe's generator and learner on a device; the same ones are
    counted once.

    Raises ``InputError`` for a pipeline or a learner that cannot be counted, and for products in
    float8 on a device that has none.
    """
    if recipe.generator.dtype == FLOAT8 and device.float8 is None:
        able = ", ".join(name for name, each in DEVICES.items() if each.float8)
        raise InputError(
            "dtype = 'float8' needs a GPU of compute capability 9.0 (Hopper) or later, as "
            f"{able}, and device = {device.name!r}; use 'bfloat16'"
        )
    learner = recipe.learner
    half = learner.precision == "bf16" or (learner.precision == "auto" and device.gpu)
    practice = recipe.practice
    # they change no count
    parts = (
        replace(recipe.generator, micro_batch=None),
        replace(learner, micro_batch=None),
    )
    key = repr((*parts, recipe.guidance, practice.early_candidates, practice.early_until))
    key += repr((practice.restart, recipe.pool.codec, recipe.seed, half))
    if key not in _STAGES:
        _STAGES[key] = count_stages(recipe, pipeline_of(recipe.generator), half_training=half)
    if not practice.generates:  # nothing of the generator is loaded
        none = (0, 0)
        return replace(_STAGES[key], weights=0, unguided_bytes=none, guided_bytes=none)
    return _STAGES[key]


_STAGES: dict[str, Stages] = {}
