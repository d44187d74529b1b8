"""The ways in which a round's guided samples come about: the paper's, and two that a recipe may choose instead.

    from noise       every trajectory runs from noise to its end: the paper (Algorithm 1)
    early rejection  ``early_candidates`` trajectories begin for each sample. When the last guided step before
                     ``early_until`` has run, those go on whose x0 had the highest criterion there, within each class
    re-practice      a trajectory begins at ``restart`` of its steps, from a sample of the pool with that step's noise

Early rejection is one round of successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) over trajectories.
The criterion at the predicted x0 is there already: guidance has computed it. With s of n steps before the cut, a sample
costs 1 + (candidates - 1) s/n of a plain one, guidance included where it falls.

Re-practice is SDEdit (Meng et al. 2022, arXiv 2108.01073) on the pool: 1 - restart of the steps, one encoding where the
pool keeps pixels. The samples are variants of known ones, so the pool gains less variety.

Over three seeds of the study neither gained beyond its noise on the plain loop of the same FLOPs (`dpfast bench study
--tables`): both are off by default.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dpfast.config import Recipe, RecipeError
from dpfast.generate.decoder import Encoder
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.recipes import image_shape, new_sampler
from dpfast.generate.sampler import GuidedSampler, SampleBatch
from dpfast.generate.trajectory import Trajectory
from dpfast.pool.pool import SamplePool
from dpfast.practice.costs import Cost, Price, Prices


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The guided samples of a round. labels: (n,) of all of them; start: the pool's size before; done: made already."""

    labels: Tensor
    start: int
    done: int
    omega: float
    learner_step: int

    def parts(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """What is left, in batches: the place in the pool of a batch's first sample, and the batch's labels."""
        for first in range(self.done, len(self.labels), size):
            yield self.start + first, self.labels[first : first + size]


class Way(Protocol):
    """Makes guided samples and pays for them in ``cost``. steps: those that a sample takes."""

    steps: int

    def make(self, wanted: Wanted, cost: Cost) -> Iterator[SampleBatch]: ...


class FromNoise:
    """The paper's way. ``sampler`` makes the samples; ``eager`` is its like for counting what one costs."""

    def __init__(self, recipe: Recipe, sampler: GuidedSampler, eager: GuidedSampler) -> None:
        self.recipe, self.sampler, self.eager = recipe, sampler, eager
        self.batch, self.steps = recipe.generator.generation_batch, recipe.generator.steps
        self.prices = Prices(eager)

    @property
    def price(self) -> Price:
        """Of one sample in the present round."""
        return self.prices.at(self.sampler.cfg_scale)

    def make(self, wanted: Wanted, cost: Cost) -> Iterator[SampleBatch]:
        batches = self.sampler.stream(
            wanted.labels[wanted.done :],
            first_id=wanted.start + wanted.done,
            batch_size=self.batch,
            omega=wanted.omega,
            learner_step=wanted.learner_step,
        )
        yield from cost.timed(batches, self.price)


class EarlyRejection(FromNoise):
    """Begins more trajectories than it ends. Ids count those that begin.

    Raises ``RecipeError`` when no guided step lies before ``early_until``, or nothing after it.
    """

    def __init__(self, recipe: Recipe, sampler: GuidedSampler, eager: GuidedSampler) -> None:
        super().__init__(recipe, sampler, eager)
        practice, total = recipe.practice, recipe.generator.steps
        self.ratio, self.initial = practice.early_candidates, practice.initial_samples
        before = [i for i in sampler.guidance.steps(total) if i < practice.early_until * total - 1e-9]
        if not before or max(before) + 1 >= total:
            raise RecipeError(
                f"early_until = {practice.early_until:g}: expected a guided step before this part of the {total} steps "
                f"and a step after it; guided are {', '.join(map(str, sorted(sampler.guidance.steps(total))))}"
            )
        self.stop = max(before) + 1
        self.early_prices = Prices(eager, lambda: eager.advance(eager.begin([0], [0]), self.stop))

    def make(self, wanted: Wanted, cost: Cost) -> Iterator[SampleBatch]:
        early = self.early_prices.at(self.sampler.cfg_scale)
        late = self.price.minus(early)
        for place, labels in wanted.parts(self.batch):
            started = time.perf_counter()
            first, last = self._id(place), self._id(place + len(labels))
            kept = self._kept(labels, torch.arange(first, last), wanted.omega)
            batch = self.sampler.finish(self.sampler.advance(kept), learner_step=wanted.learner_step)
            cost.pay(last - first, early)
            cost.add(len(batch), late, time.perf_counter() - started)
            yield batch

    def _id(self, place: int) -> int:
        """The id of the first candidate for the sample at this place of the pool."""
        return self.initial + int(self.ratio * (place - self.initial))

    def _kept(self, labels: Tensor, ids: Tensor, omega: float) -> Trajectory:
        """Of the candidates ``ids`` before the cut, as many of each label as ``labels`` (n,) has."""
        candidates = labels[torch.arange(len(ids)) % len(labels)]
        begun = []
        for rows in torch.arange(len(ids)).split(self.batch):
            start = self.sampler.begin(candidates[rows], ids[rows], omega=omega)
            begun.append(self.sampler.advance(start, self.stop))
        every = Trajectory.joined(begun)
        assert every.value is not None
        scores = every.value.cpu().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order = scores.argsort(descending=True, stable=True)
        best = [order[candidates[order] == label][:count] for label, count in _counted(labels)]
        return every.take(torch.cat(best).sort().values.to(every.x.device))


class RePractice(FromNoise):
    """Begins half-way, from the pool's samples: of each class in a random order, each once before any comes again.

    Raises ``RecipeError`` when no guided step is left, or when the pipeline cannot encode the pool's images.
    """

    def __init__(
        self, recipe: Recipe, sampler: GuidedSampler, eager: GuidedSampler, pool: Callable[[], SamplePool]
    ) -> None:
        super().__init__(recipe, sampler, eager)
        self.pool, restart, total = pool, recipe.practice.restart, self.steps
        self.start = -int(-(restart * total - 1e-9) // 1)
        if not any(i >= self.start for i in sampler.guidance.steps(total)):
            guided = ", ".join(map(str, sorted(sampler.guidance.steps(total))))
            raise RecipeError(
                f"restart = {restart:g}: expected a guided step at or after step {self.start} of {total}; "
                f"guided are {guided}"
            )
        if recipe.pool.codec != "latents" and not isinstance(sampler.pipeline.decoder, Encoder):
            raise RecipeError(f"restart = {restart:g}: images of another size than decoded need codec = 'latents'")
        self.steps = total - self.start
        self.image = torch.zeros(1, *image_shape(sampler.pipeline), device=sampler.pipeline.device)
        self.prices = Prices(eager, self._one)

    def _one(self) -> None:
        """A sample, to be counted."""
        pipeline = self.eager.pipeline
        latents = torch.zeros(1, *pipeline.denoiser.sample_shape, device=pipeline.device)
        if self.recipe.pool.codec != "latents":
            latents = _encoded(pipeline, self.image)
        self.eager.finish(self.eager.advance(self.eager.begin([0], [0], latents=latents, step=self.start)))

    def make(self, wanted: Wanted, cost: Cost) -> Iterator[SampleBatch]:
        parents = self._parents(wanted)
        for place, labels in wanted.parts(self.batch):
            started = time.perf_counter()
            rows = parents[place - wanted.start : place - wanted.start + len(labels)]
            ids = torch.arange(place, place + len(labels))
            latents = self._latents(rows)
            start = self.sampler.begin(labels, ids, omega=wanted.omega, latents=latents, step=self.start)
            batch = self.sampler.finish(self.sampler.advance(start), learner_step=wanted.learner_step)
            cost.add(len(batch), self.price, time.perf_counter() - started)
            yield batch

    def _parents(self, wanted: Wanted) -> Tensor:
        """(n,) rows of the pool, one for each of the round's samples; of the round's seed and the pool alone."""
        known = self.pool().column("label")[: wanted.start].cpu()
        generator = torch.Generator().manual_seed((self.recipe.seed << 32) + wanted.start)
        parents = torch.empty(len(wanted.labels), dtype=torch.int64)
        for label, count in _counted(wanted.labels):
            members = torch.nonzero(known == label).flatten()
            order = members[torch.randperm(len(members), generator=generator)]
            parents[wanted.labels == label] = order.repeat(-(-count // len(order)))[:count]
        return parents

    @torch.no_grad()
    def _latents(self, rows: Tensor) -> Tensor:
        pool, pipeline = self.pool(), self.sampler.pipeline
        if pool.codec == "latents":
            payload = pool.payload(rows)
            assert isinstance(payload, Tensor)
            return payload.to(pipeline.device)
        return _encoded(pipeline, pool.images(rows).to(pipeline.device).float().div(127.5).sub(1.0))


def way_of(recipe: Recipe, sampler: GuidedSampler, eager: GuidedSampler, pool: Callable[[], SamplePool]) -> Way:
    """The way that a recipe chooses. Raises ``RecipeError`` where its values leave nothing to choose."""
    if recipe.practice.early_candidates > 1:
        return EarlyRejection(recipe, sampler, eager)
    if recipe.practice.restart:
        return RePractice(recipe, sampler, eager, pool)
    return FromNoise(recipe, sampler, eager)


def check_way(recipe: Recipe, pipeline: Pipeline) -> None:
    """Raises ``RecipeError`` where the recipe's way does not fit its steps or its pipeline."""
    sampler = new_sampler(recipe, pipeline, None, compile=False, cuda_graphs=False)
    way_of(recipe, sampler, sampler, lambda: SamplePool())


def _counted(labels: Tensor) -> list[tuple[int, int]]:
    values, counts = labels.unique(return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


@torch.no_grad()
def _encoded(pipeline: Pipeline, images: Tensor) -> Tensor:
    assert isinstance(pipeline.decoder, Encoder)
    return pipeline.decoder.encode(images)
