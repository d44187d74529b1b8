"""The ways in which a round's guided samples come about: the paper's method, and two that a recipe
may choose instead.

    FromNoise       every trajectory runs from noise to its end: the paper (Algorithm 1)
    EarlyRejection  ``early_candidates`` trajectories begin for each sample. When the last guided
                    step before ``early_until`` has run, those go on whose x0 had the highest
                    criterion there, within each class
    RePractice      a trajectory begins at ``restart`` of its steps, from a sample of the pool with
                    that step's noise

Early rejection is one round of successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943)
over trajectories. The criterion at the predicted x0 is there already: guidance has computed it.
With s of n steps before the cut, a sample costs 1 + (candidates - 1) s/n of a plain one, guidance
included where it falls.

Re-practice is SDEdit (Meng et al. 2022, arXiv 2108.01073) on the pool: 1 - restart of the steps,
one encoding where the pool keeps pixels. The samples are variants of known ones, so the pool gains
less variety.

Over three seeds of the study neither gained beyond its noise on the plain loop of the same FLOPs
(`dpfast bench study --tables`): both are off by default.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dpfast.config import Recipe
from dpfast.errors import RecipeError
from dpfast.generate.from_recipe import new_sampler
from dpfast.generate.models.decoder import Encoder
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline, Sampler
from dpfast.generate.sampler import GuidedSampler
from dpfast.generate.step import Trajectory
from dpfast.hardware.out_of_memory import HalvingBatches
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.protocol import Pool
from dpfast.pool.snapshot import PoolSnapshot
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost, Prices
from dpfast.sources.strengths import Strengths


@dataclass(frozen=True, kw_only=True)
class GuidedRequest:
    """Asks a guided method for the samples of a round, of which this rank makes its part.

    labels: (n,) int64 of all of them; start: the pool's size before; strengths: of the guidance;
    turn: the rank of the first batch; done: how many of this rank's are made already.
    """

    labels: Tensor
    start: int
    done: int
    strengths: Strengths
    cfg_scale: float
    learner_step: int
    turn: int = 0
    ranks: Ranks = ALONE

    def parts(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the parts that are left, in batches: the index in the pool of a batch's first
        sample, and the batch's labels.
        """
        for indices in self.ranks.batches(len(self.labels), size, turn=self.turn, done=self.done):
            yield self.start + indices.start, self.labels[indices.start : indices.stop]

    def rest(self, size: int) -> Tensor:
        """Returns (n,) int64, all indices of ``parts``, counted from the round's start."""
        return self.ranks.indices(len(self.labels), size, turn=self.turn, done=self.done)

    def shares(self, size: int) -> list[Tensor]:
        """Returns ``rest`` of every rank. Collective: all ranks call it together."""
        ranks = self.ranks
        return [
            ranks.indices(len(self.labels), size, turn=self.turn, done=done, rank=rank)
            for rank, done in enumerate(ranks.all_gather_object(self.done))
        ]


class GuidedMethod(Protocol):
    """Makes guided samples with ``sampler`` and pays for them in ``cost``. steps: those that a
    sample takes, from ``start`` on.
    """

    @property
    def sampler(self) -> Sampler: ...

    steps: int
    start: int

    def make(self, request: GuidedRequest, cost: Cost) -> Iterator[SampleBatch]:
        """Returns this rank's samples that are left of a request, batch by batch."""
        ...


def early_stop(recipe: Recipe, guided: Collection[int]) -> int:
    """Returns the step before which early rejection chooses; ``guided``: the guided steps.

    Raises ``RecipeError`` when no guided step lies before ``early_until``, or nothing after it.
    """
    until = recipe.practice.early_until
    total = recipe.generator.steps
    before = [i for i in guided if i < until * total - 1e-9]
    if not before or max(before) + 1 >= total:
        raise RecipeError(
            f"early_until = {until:g}: expected a guided step before this part of the {total} "
            f"steps and a step after it; guided are {_shown(guided)}"
        )
    return max(before) + 1


def restart_step(recipe: Recipe, guided: Collection[int]) -> int:
    """Returns the step at which re-practice begins. Raises ``RecipeError`` when no guided step is
    left.
    """
    restart = recipe.practice.restart
    total = recipe.generator.steps
    start = -int(-(restart * total - 1e-9) // 1)
    if not any(i >= start for i in guided):
        raise RecipeError(
            f"restart = {restart:g}: expected a guided step at or after step {start} of {total}; "
            f"guided are {_shown(guided)}"
        )
    return start


def _shown(steps: Collection[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"


class FromNoise:
    """Runs every trajectory from noise to its end. ``sampler`` makes the samples; ``eager`` is its
    like for counting what one costs.
    """

    start = 0

    def __init__(self, recipe: Recipe, sampler: Sampler, eager: Sampler) -> None:
        self.recipe = recipe
        self.sampler = sampler
        self.eager = eager
        self.batch = recipe.generator.batch_size
        self.steps = recipe.generator.steps
        self.prices = Prices(eager)

    def make(self, request: GuidedRequest, cost: Cost) -> Iterator[SampleBatch]:
        rest = request.rest(self.batch)
        labels = request.labels[rest]
        batches = self.sampler.stream(
            labels,
            sample_ids=request.start + rest,
            batch_size=self.batch,
            **request.strengths.rows(labels),
            cfg_scale=request.cfg_scale,
            learner_step=request.learner_step,
        )
        yield from cost.timed(batches, self.prices.at(request.cfg_scale))


class EarlyRejection(FromNoise):
    """Begins more trajectories than it ends. Ids count those that begin.

    Who is kept depends on the batches that ``generator.batch_size`` makes of a round, not on what
    fits into memory.
    """

    sampler: GuidedSampler
    eager: GuidedSampler

    def __init__(self, recipe: Recipe, sampler: GuidedSampler, eager: GuidedSampler) -> None:
        super().__init__(recipe, sampler, eager)
        self.ratio = recipe.practice.early_candidates
        self.initial = recipe.practice.initial_samples
        self.stop = early_stop(recipe, sampler.guidance.steps(self.steps))
        self.batches = HalvingBatches(
            recipe.generator.at_once, sampler.pipeline.device, after_out_of_memory=sampler.close
        )
        self.early_prices = Prices(eager, self._early)

    def make(self, request: GuidedRequest, cost: Cost) -> Iterator[SampleBatch]:
        early = self.early_prices.at(request.cfg_scale)
        late = self.prices.at(request.cfg_scale).minus(early)
        for index, labels in request.parts(self.batch):
            started = time.perf_counter()
            first = self._id(index)
            last = self._id(index + len(labels))
            kept = self._kept(labels, torch.arange(first, last), request)
            parts = self.batches.over(
                len(kept), partial(self._finished, kept, request.learner_step)
            )
            batch = replace(joined(list(parts)), retries=self.batches.since())
            cost.pay(last - first, early)
            cost.take(batch, late, time.perf_counter() - started)
            yield batch

    def _early(self, cfg_scale: float) -> None:
        """Runs one trajectory up to the cut, to be counted."""
        self.eager.advance(self.eager.begin([0], [0], cfg_scale=cfg_scale), self.stop)

    def _finished(self, kept: Trajectory, learner_step: int, rows: slice) -> SampleBatch:
        """Returns these rows of the trajectories that go on, from the cut to the end."""
        some = kept.take(torch.arange(rows.start, rows.stop, device=kept.x.device))
        if rows.start:  # what was skipped before the cut is told once
            some = replace(some, skipped=torch.zeros_like(kept.skipped))
        return self.sampler.finish(self.sampler.advance(some), learner_step=learner_step)

    def _id(self, index: int) -> int:
        """Returns the id of the first candidate for the sample of this index in the pool."""
        return self.initial + int(self.ratio * (index - self.initial))

    def _kept(self, labels: Tensor, ids: Tensor, request: GuidedRequest) -> Trajectory:
        """Returns the best of the candidates ``ids`` before the cut, as many of each label as
        ``labels`` (n,) has.
        """
        candidates = labels[torch.arange(len(ids)) % len(labels)]

        def begun(rows: slice) -> Trajectory:
            started = self.sampler.begin(
                candidates[rows],
                ids[rows],
                **request.strengths.rows(candidates[rows]),
                cfg_scale=request.cfg_scale,
            )
            return self.sampler.advance(started, self.stop)

        every = Trajectory.joined(list(self.batches.over(len(ids), begun)))
        assert every.value is not None
        scores = every.value.cpu().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order = scores.argsort(descending=True, stable=True)
        best = [order[candidates[order] == label][:count] for label, count in _counted(labels)]
        return every.take(torch.cat(best).sort().values.to(every.x.device))


class RePractice(FromNoise):
    """Begins half-way, from the pool's samples: of each class in a random order, each once before
    any comes again.

    Several ranks draw the parents alike, out of the pool of all; each is sent those of its part of
    a round before it begins, as they are stored. Making a round is then collective.

    Raises ``RecipeError`` when the pipeline cannot encode the pool's images.
    """

    sampler: GuidedSampler
    eager: GuidedSampler

    def __init__(
        self,
        recipe: Recipe,
        sampler: GuidedSampler,
        eager: GuidedSampler,
        pool: Callable[[], Pool],
    ) -> None:
        super().__init__(recipe, sampler, eager)
        self.pool = pool
        self.start = restart_step(recipe, sampler.guidance.steps(self.steps))
        if recipe.pool.codec != "latents" and not isinstance(sampler.pipeline.decoder, Encoder):
            raise RecipeError(
                f"restart = {recipe.practice.restart:g}: images of another size than decoded need "
                "codec = 'latents'"
            )
        self.steps -= self.start
        self.batches = HalvingBatches(
            recipe.generator.at_once, sampler.pipeline.device, after_out_of_memory=sampler.close
        )
        self.image = torch.zeros(1, *sampler.pipeline.image_shape, device=sampler.pipeline.device)
        self.prices = Prices(eager, self._one)

    def _one(self, cfg_scale: float) -> None:
        """Makes one sample, to be counted."""
        pipeline = self.eager.pipeline
        latents = torch.zeros(1, *pipeline.denoiser.sample_shape, device=pipeline.device)
        if self.recipe.pool.codec != "latents":
            latents = _encoded(pipeline, self.image)
        started = self.eager.begin([0], [0], cfg_scale=cfg_scale, latents=latents, step=self.start)
        self.eager.finish(self.eager.advance(started))

    def make(self, request: GuidedRequest, cost: Cost) -> Iterator[SampleBatch]:
        rest = request.rest(self.batch)
        shares = request.shares(self.batch)
        held, parents = self.pool().fetch(self._parents(request), parts=shares)
        price = self.prices.at(request.cfg_scale)
        started = time.perf_counter()

        def made(rows: slice) -> SampleBatch:
            indices = rest[rows]
            labels = request.labels[indices]
            start = self.sampler.begin(
                labels,
                request.start + indices,
                **request.strengths.rows(labels),
                cfg_scale=request.cfg_scale,
                latents=self._latents(held, parents[rows]),
                step=self.start,
            )
            return self.sampler.finish(
                self.sampler.advance(start), learner_step=request.learner_step
            )

        for part in self.batches.over(len(rest), made):
            batch = replace(part, retries=self.batches.since())
            cost.take(batch, price, time.perf_counter() - started)
            yield batch
            started = time.perf_counter()

    def _parents(self, request: GuidedRequest) -> Tensor:
        """Returns (n,) indices in the pool, one for each of the round's samples, of all ranks; of
        the round's seed and the pool alone.
        """
        known = self.pool().column("label")[: request.start].cpu()
        generator = torch.Generator().manual_seed((self.recipe.seed << 32) + request.start)
        parents = torch.empty(len(request.labels), dtype=torch.int64)
        for label, count in _counted(request.labels):
            members = torch.nonzero(known == label).flatten()
            order = members[torch.randperm(len(members), generator=generator)]
            parents[request.labels == label] = order.repeat(-(-count // len(order)))[:count]
        return parents

    @torch.no_grad()
    def _latents(self, held: PoolSnapshot, rows: Tensor) -> Tensor:
        """Returns (B, c, h, w) on the device, of the samples in these rows of ``held``."""
        pipeline = self.sampler.pipeline
        if held.codec == "latents":
            payload = held.payload(rows)
            assert isinstance(payload, Tensor)
            return payload.to(pipeline.device)
        return _encoded(pipeline, held.images(rows).to(pipeline.device).float().div(127.5).sub(1.0))


def guided_method(
    recipe: Recipe, sampler: Sampler, eager: Sampler, pool: Callable[[], Pool]
) -> GuidedMethod:
    """Returns the method that a recipe chooses. Raises ``RecipeError`` where its values leave
    nothing to choose.
    """
    candidates, restart = recipe.practice.early_candidates, recipe.practice.restart
    if candidates == 1 and not restart:
        return FromNoise(recipe, sampler, eager)
    if not (isinstance(sampler, GuidedSampler) and isinstance(eager, GuidedSampler)):
        name, value = ("restart", restart) if restart else ("early_candidates", candidates)
        raise RecipeError(f"{name} = {value:g}: needs a dpfast.Pipeline, whose samples can pause")
    if restart:
        return RePractice(recipe, sampler, eager, pool)
    return EarlyRejection(recipe, sampler, eager)


def check_guided_method(recipe: Recipe, pipeline: Pipeline | OwnPipeline) -> None:
    """Raises ``RecipeError`` where the recipe's method does not fit its steps or its pipeline, and
    ``InputError`` where no step is guided, or none with what an anchor is made of, or where a
    class has strengths that do not go together.
    """
    rounds = [recipe.of_round(number) for number in range(1, recipe.scheduled_rounds + 1)]
    seen = set()
    for each in rounds or [recipe]:
        key = (each.guidance, each.generator.cfg_scale)
        if key not in seen:
            _check_round(each, pipeline)
        seen.add(key)


def _check_round(recipe: Recipe, pipeline: Pipeline | OwnPipeline) -> None:
    """Checks one round, whose recipe this is, for ``check_guided_method``."""
    guidance, scale = recipe.guidance, recipe.generator.cfg_scale
    strengths = Strengths.of(guidance, pipeline.class_names)
    omegas, anchors = (torch.as_tensor(each) for each in (strengths.omega, strengths.anchor))
    early = recipe.practice.early_candidates
    if early > 1 and float(omegas.min()) <= 0:
        raise RecipeError(
            f"omega_classes = {guidance.omega_classes!r}: has {float(omegas.min()):g}; expected "
            f"numbers above 0 with early_candidates = {early:g}: guidance scores the candidates, "
            "and the highest stay"
        )
    sampler = new_sampler(recipe, pipeline, None, compile=False, cuda_graphs=False)
    way = guided_method(recipe, sampler, sampler, lambda: SamplePool())
    if not isinstance(sampler, GuidedSampler):
        if guidance.anchor_classes:
            raise RecipeError(
                f"anchor_classes = {guidance.anchor_classes!r}: needs a dpfast.Pipeline, whose "
                "samples have an anchor each"
            )
        return
    sampler.guidance.check_steps(len(sampler.table))
    if bool(((anchors > 0) & (omegas != 0)).any()):
        sampler.check_anchored(scale, anchors, step=way.start)


def joined(parts: list[SampleBatch]) -> SampleBatch:
    """Returns parts of one batch, all with latents or none, in their order."""
    names = ["images", "labels", "sample_ids", "entropy"]
    if parts[0].latents is not None:
        names.append("latents")
    rows: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in names
    }
    return replace(parts[0], **rows, skipped=sum(part.skipped for part in parts))


def _counted(labels: Tensor) -> list[tuple[int, int]]:
    values, counts = labels.unique(return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


@torch.no_grad()
def _encoded(pipeline: Pipeline, images: Tensor) -> Tensor:
    assert isinstance(pipeline.decoder, Encoder)
    return pipeline.decoder.encode(images)
