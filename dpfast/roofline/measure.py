"""The stages of a recipe, timed on this machine: a few batches of each, with the weights that the recipe names."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from dpfast.config import Recipe
from dpfast.evaluate.measures import predict
from dpfast.feed.augment import Augment
from dpfast.feed.loader import make_loader
from dpfast.generate.recipes import load_pipeline, new_sampler
from dpfast.generate.trajectory import SampleBatch
from dpfast.learn.committee import guiding
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.pool.pool import SamplePool
from dpfast.practice.costs import Cost
from dpfast.practice.guided import Wanted, way_of

EVALUATED = 500  # images


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of one unit: an unguided and a guided sample, an image in a training step, an evaluated image."""

    unguided: float
    guided: float
    training: float
    evaluation: float


def measure(recipe: Recipe, *, rounds: int = 3, steps: int = 40) -> Timings:
    """Medians of ``rounds`` batches, and of ``rounds`` times ``steps`` training steps, after a round to warm up.

    The samples that are made are those that the learner is trained on. Raises what ``load_pipeline`` raises.
    """
    pipeline = load_pipeline(recipe.generator, device="cpu")
    classes, config = pipeline.denoiser.classes, recipe.learner
    torch.manual_seed(recipe.seed)
    learner = build_learner(config.model, classes=classes, channels=pipeline.image_channels, **config.options)
    trainer = Trainer(learner, config, iterations=10**6)
    guide, other = (trainer.classifier(which) for which in (recipe.guidance.guide_with, "raw"))
    guide = guiding(recipe.guidance.criterion, guide, other).eval()
    labels = torch.arange(recipe.generator.generation_batch) % classes
    plain, sampler = (new_sampler(recipe, pipeline, model) for model in (None, guide))
    unguided = _median(partial(_make, plain.stream, labels, batch_size=len(labels)), rounds) / len(labels)
    batch = plain.generate(labels)
    pool = SamplePool(recipe.pool.codec if recipe.pool.codec != "latents" else "pixels", shape=batch.images.shape[1:])
    pool.append(batch, round=0, omega=0.0, cfg_scale=1.0, steps=1, seed=0)
    way = way_of(recipe, sampler, new_sampler(recipe, pipeline, guide, compile=False, cuda_graphs=False), lambda: pool)
    wanted = Wanted(labels=labels, start=len(pool), done=0, omega=recipe.guidance.omega, learner_step=0)
    guided = _median(partial(_make, way.make, wanted, Cost()), rounds) / len(labels)
    augment = Augment(flip=config.flip, shift=config.shift, crop=config.crop, mixup=config.mixup, cutmix=config.cutmix)
    loader = make_loader(
        config.loader, pool, batch_size=config.batch_size, seed=recipe.seed, augment=augment, classes=classes
    )

    def train() -> None:
        learner.train()
        for _ in range(steps):
            float(trainer.step(*next(loader)))

    try:
        training = _median(train, rounds) / (steps * config.batch_size)
    finally:
        loader.close()
    images = batch.images[torch.arange(EVALUATED) % len(batch)]
    evaluation = _median(lambda: predict(trainer.classifier("ema"), images), rounds) / EVALUATED
    return Timings(unguided=unguided, guided=guided, training=training, evaluation=evaluation)


def _make(make: Callable[..., Iterator[SampleBatch]], *arguments: object, **named: object) -> None:
    for batch in make(*arguments, **named):
        batch.images.sum().item()  # waits for a GPU


def _median(call: Callable[[], object], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
