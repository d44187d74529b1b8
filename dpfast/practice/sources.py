"""Where the training samples come from: Deliberate Practice and its rivals, behind one interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.generate.guidance import GuidanceConfig, Through
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler, SampleBatch
from dpfast.ops.guided_step import Mode

PROBE_IDS = 1 << 40  # ids of samples that no pool holds: the yardstick for entropy


class Source(Protocol):
    """Makes the samples of a run. Sample ids count up from 0 and labels go round the classes."""

    initial_samples: int

    def initial(self) -> Iterator[SampleBatch]:
        """The samples that training starts with."""
        ...

    def available(self, pool_size: int) -> int:
        """How many samples the next addition to a pool of ``pool_size`` would bring; 0: none."""
        ...

    def more(self, pool_size: int, learner_step: int) -> Iterator[SampleBatch]:
        """The samples of one addition to a pool of ``pool_size``."""
        ...


def balanced_labels(first_id: int, count: int, classes: int) -> Tensor:
    """(count,) labels: sample id i has label i mod classes."""
    return torch.arange(first_id, first_id + count) % classes


class DeliberatePracticeSource:
    """N unguided samples, then P samples per addition, guided by the learner as it is at that moment."""

    def __init__(self, recipe: Recipe, pipeline: Pipeline, learner: nn.Module) -> None:
        self.recipe = recipe
        self.initial_samples = recipe.practice.initial_samples
        self.sampler = new_sampler(recipe, pipeline, learner)
        self.unguided = new_sampler(recipe, pipeline, None)

    def initial(self) -> Iterator[SampleBatch]:
        labels = balanced_labels(0, self.initial_samples, self.sampler.pipeline.denoiser.classes)
        return self.unguided.stream(labels, batch_size=self.recipe.generator.generation_batch)

    def available(self, pool_size: int) -> int:
        return max(0, min(self.recipe.practice.round_samples, self.recipe.practice.maximum_samples - pool_size))

    def more(self, pool_size: int, learner_step: int) -> Iterator[SampleBatch]:
        classes = self.sampler.pipeline.denoiser.classes
        return self.sampler.stream(
            balanced_labels(pool_size, self.available(pool_size), classes),
            first_id=pool_size,
            batch_size=self.recipe.generator.generation_batch,
            learner_step=learner_step,
        )


class StaticSource:
    """All samples at the start, unguided. ``ready`` are samples with the first ids that exist already."""

    def __init__(self, recipe: Recipe, pipeline: Pipeline, total: int, ready: SampleBatch | None = None) -> None:
        self.recipe, self.ready = recipe, ready
        self.initial_samples = total
        self.sampler = new_sampler(recipe, pipeline, None)

    def initial(self) -> Iterator[SampleBatch]:
        made = 0
        if self.ready is not None:
            made = len(self.ready)
            yield self.ready
        labels = balanced_labels(made, self.initial_samples - made, self.sampler.pipeline.denoiser.classes)
        if len(labels):
            yield from self.sampler.stream(labels, first_id=made, batch_size=self.recipe.generator.generation_batch)

    def available(self, pool_size: int) -> int:
        return 0

    def more(self, pool_size: int, learner_step: int) -> Iterator[SampleBatch]:
        raise RuntimeError("a static source adds nothing")


def new_sampler(recipe: Recipe, pipeline: Pipeline, learner: nn.Module | None) -> GuidedSampler:
    """The sampler that a recipe describes; unguided without a learner."""
    guidance = recipe.guidance
    return GuidedSampler(
        pipeline,
        learner,
        guidance=GuidanceConfig(
            omega=guidance.omega,
            every=guidance.guide_every,
            start=guidance.guide_from,
            until=guidance.guide_until,
            mode=cast(Mode, guidance.mode),
            through=cast(Through, guidance.through),
            criterion=guidance.criterion,
        ),
        steps=recipe.generator.steps,
        cfg_scale=recipe.generator.cfg_scale,
        cfg_interval=(recipe.generator.cfg_from, recipe.generator.cfg_until),
        eta=recipe.generator.eta,
        seed=recipe.seed,
        compile=recipe.generator.compile,  # never "auto": its choice follows the clock, and with it the rounding
    )
