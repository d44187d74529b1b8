"""The stages of a recipe, counted: what one sample, one training step and one evaluated image do
and hold.

The code that is counted is the code that runs: the sampler's own steps and the learner's own
training, on meta tensors.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dpfast.config import Recipe
from dpfast.errors import RecipeError
from dpfast.generate.batching import dearest
from dpfast.generate.from_recipe import new_sampler
from dpfast.generate.models.blocks import blocks_of
from dpfast.generate.models.decoder import Encoder, ResizedDecoder
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.generate.step import finish_function, step_function
from dpfast.hardware.flops import Counts, Fused, count_work
from dpfast.hardware.live_bytes import bytes_per_sample
from dpfast.learn.models import guiding, recipe_learner
from dpfast.planning.training import Training, count_learner
from dpfast.sources.guided_methods import early_stop, restart_step
from dpfast.sources.strengths import Strengths

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The counts of one unit of each stage, and the bytes that they hold.

    Attributes:
        unguided: An unguided sample, from noise to pixels.
        guided: A guided sample, in the mean of all rounds.
        learner: An image in a training step and an evaluated one.
        weights: Bytes of the generator's weights.
        unguided_bytes: (fixed, per sample) bytes of the dearest unguided step or the decoding,
            beside the weights.
        guided_bytes: The same of a guided sample.
        transformer: True where the denoiser is one.
        classes: Number of classes K.
        image: (C, H, W) of an image.
        latent: (C, H, W) of a latent.
    """

    unguided: Counts
    guided: Counts
    learner: Training
    weights: int
    unguided_bytes: tuple[int, int]
    guided_bytes: tuple[int, int]
    transformer: bool
    classes: int
    image: tuple[int, ...]
    latent: tuple[int, ...]

    @property
    def training(self) -> Counts:
        return self.learner.training

    @property
    def evaluation(self) -> Counts:
        return self.learner.evaluation


def count_stages(recipe: Recipe, pipeline: Pipeline, *, half_training: bool) -> Stages:
    """Counts a recipe's stages with a pipeline of ``without_weights``.

    half_training: the learner's forward and backward passes run under bf16 autocast.

    Raises ``InputError`` for a learner that cannot be built, ``InputError`` for a sampler that
    cannot.
    """
    pipeline = replace(pipeline, device=META)
    classes = pipeline.denoiser.classes
    with META:
        learner = recipe_learner(
            recipe.learner, classes=classes, channels=pipeline.image_channels
        ).eval()
    guide = guiding(recipe.guidance.criterion, learner, learner).eval()
    batch = recipe.generator.batch_size
    plain = new_sampler(recipe, pipeline, None, compile=False, cuda_graphs=False)
    image = tuple(finish_function(plain.parts)(plain.runner.blank(1).x).images.shape[1:])
    decoding = _decoding_bytes(plain)
    unguided = _sample(plain, batch, guided=False)
    unguided_bytes = _dearer(decoding, _step_bytes(plain, guided=False))
    guided, guided_bytes = Counts(), decoding
    for share, way in _ways(recipe, pipeline):
        sampler = new_sampler(way, pipeline, guide, compile=False, cuda_graphs=False)
        guides = Strengths.of(way.guidance, pipeline.class_names).guides
        one = _guided(way, sampler, batch) if guides else _sample(sampler, batch, guided=False)
        guided += one * share
        guided_bytes = _dearer(guided_bytes, _step_bytes(sampler, guided=guides))
    return Stages(
        unguided=unguided,
        guided=guided,
        learner=count_learner(recipe.learner, classes, image, half=half_training),
        weights=_weights(pipeline),
        unguided_bytes=unguided_bytes,
        guided_bytes=guided_bytes,
        transformer="transformer_blocks" in blocks_of(pipeline.denoiser),
        classes=classes,
        image=image,
        latent=pipeline.denoiser.sample_shape,
    )


def _ways(recipe: Recipe, pipeline: Pipeline) -> list[tuple[float, Recipe]]:
    """Returns the ways in which rounds make their samples, as the recipe of such a round, each with
    its share of all samples up to the maximum; the first round's where there is none.
    """
    practice = recipe.practice
    found: dict[tuple[object, ...], tuple[int, Recipe]] = {}
    rounds = max(1, len(practice.add_at) or practice.rounds_within(practice.maximum_samples))
    left = max(1, practice.maximum_samples - practice.initial_samples)
    for number in range(1, rounds + 1):
        last = number >= min(rounds, max(1, recipe.scheduled_rounds))
        count = max(1, left if last else min(left, practice.round_samples))
        way = recipe.of_round(number)
        guidance = way.guidance
        guides = Strengths.of(guidance, pipeline.class_names).guides
        key = (
            guides,
            way.generator.cfg_scale == 1,
            *((guidance.every, guidance.start, guidance.until, guidance.through) if guides else ()),
        )
        before, first = found.get(key, (0, way))
        found[key] = (before + count, first)
        left -= count
        if last:
            break
    total = sum(count for count, _ in found.values())
    return [(count / total, way) for count, way in found.values()]


def _weights(pipeline: Pipeline) -> int:
    """Returns bytes of the denoiser's weights and of the decoders'; one that is both counts
    once.
    """
    parts: list[Any] = [pipeline.denoiser, pipeline.decoder, pipeline.guidance_decoder]
    parts = [part.decoder if isinstance(part, ResizedDecoder) else part for part in parts]
    models = {id(part.model): part.model for part in parts if hasattr(part, "model")}
    return sum(p.numel() * p.itemsize for model in models.values() for p in model.parameters())


def _guided(recipe: Recipe, sampler: GuidedSampler, batch: int) -> Counts:
    """Returns one guided sample in the way that the recipe chooses
    (``dpfast.sources.guided_methods``).
    """
    practice, steps = recipe.practice, sampler.guidance.steps(len(sampler.table))
    if practice.early_candidates > 1:
        stop = early_stop(recipe, steps)
        early = _steps(sampler, batch, guided=True, stop=stop) * practice.early_candidates
        return early + _steps(sampler, batch, guided=True, start=stop) + _decoding(sampler, batch)
    if practice.restart:
        late = _steps(sampler, batch, guided=True, start=restart_step(recipe, steps)) + _decoding(
            sampler, batch
        )
        return late if recipe.pool.codec == "latents" else late + _encoding(sampler, batch)
    return _sample(sampler, batch, guided=True)


def _sample(sampler: GuidedSampler, batch: int, *, guided: bool) -> Counts:
    """Returns one sample of a batch: its steps and its decoding."""
    return _steps(sampler, batch, guided=guided) + _decoding(sampler, batch)


@torch.no_grad()
def _steps(
    sampler: GuidedSampler, batch: int, *, guided: bool, start: int = 0, stop: int | None = None
) -> Counts:
    """Returns the steps from ``start`` to ``stop`` of one sample of a batch."""
    total, blank = Counts(), sampler.runner.blank(batch)
    inputs = sampler.runner.inputs(blank)
    for variant, times in Counter(sampler.variants(guided=guided)[start:stop]).items():
        if variant.features == "reuse":  # of the shape that a step before it kept
            keep = step_function(sampler.parts, variant._replace(features="keep"))
            inputs = inputs._replace(features=keep(*inputs).features)
        total += count_work(partial(step_function(sampler.parts, variant), *inputs)) * times
    return total * (1 / batch)


@torch.no_grad()
def _decoding(sampler: GuidedSampler, batch: int) -> Counts:
    decode = finish_function(sampler.parts)
    return count_work(partial(decode, sampler.runner.blank(batch).x)) * (1 / batch)


@torch.no_grad()
def _encoding(sampler: GuidedSampler, batch: int) -> Counts:
    decoder = sampler.pipeline.decoder
    if not isinstance(decoder, Encoder):
        raise RecipeError("restart: images of another size than decoded need codec = 'latents'")
    shape = finish_function(sampler.parts)(sampler.runner.blank(1).x).images.shape[1:]
    return count_work(lambda: decoder.encode(torch.empty(batch, *shape, device=META))) * (1 / batch)


def _dearer(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Returns the one of two lines (fixed, per sample) that rises faster."""
    return max(one, other, key=lambda line: line[1])


def _decoding_bytes(sampler: GuidedSampler) -> tuple[int, int]:
    """Returns (fixed, per sample) bytes of decoding latents."""
    decode = finish_function(sampler.parts)
    with Fused():
        return bytes_per_sample(lambda size: decode(sampler.runner.blank(size).x))


def _step_bytes(sampler: GuidedSampler, *, guided: bool) -> tuple[int, int]:
    """Returns (fixed, per sample) bytes of the dearest of the steps."""
    step = step_function(sampler.parts, dearest(sampler.variants(guided=guided)))

    def one(size: int) -> object:
        return step(*sampler.runner.inputs(sampler.runner.blank(size)))

    with Fused():
        return bytes_per_sample(one)
