"""Where the training samples come from: Deliberate Practice and its rivals, behind one interface.

    dp        N unguided samples, then rounds of P that the learner of that moment guides
              (``dpfast.sources.guided_methods``)
    dynamic   the same rounds, unguided: the timing alone
    prune     the same rounds from an unguided surplus, of which the highest entropy under that
              learner is kept
    static    all samples at the start

Sample ids key the noise, and unguided samples depend on id and label alone: sources share those
with the same id.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.evaluate.measures import predict
from dpfast.generate.from_recipe import new_sampler
from dpfast.generate.pipelines import Pipeline
from dpfast.ops import entropy
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.pool import SamplePool
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost, Prices
from dpfast.sources.guided_methods import RoundRequest, guided_method
from dpfast.sources.yardstick import Yardstick

EAGER = {"compile": False, "cuda_graphs": False}  # for few samples


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is asked of a source. number: 0 for the initial samples; start: the pool's size before;
    count: how many.

    per_class: (K,) validation accuracies of the learner at this moment; None in round 0. turn: the
    first batch's rank.
    """

    number: int
    start: int
    count: int
    learner_step: int = 0
    per_class: Tensor | None = None
    turn: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The request for JSON, which knows no NaN: None for a class without images."""
        known = self.per_class
        plain = None if known is None else [None if v != v else v for v in known.tolist()]
        return {**dataclasses.asdict(self), "per_class": plain}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Round:
        """The request that ``to_dict`` gave."""
        known = plain["per_class"]
        if known is not None:
            known = torch.tensor([float("nan") if v is None else v for v in known])
        return cls(**{**plain, "per_class": known})


class Source(abc.ABC):
    """Makes the samples of a run. ``available`` and ``make`` are a source's own; the rest has
    defaults.

    initial_samples: of round 0. moments: the steps after which rounds are due, in place of
    patience; None: by patience. streams: whether ``make`` can go on in the middle of a round.
    cost: of everything made so far. yardstick: what a round's entropy is compared with.
    """

    moments: Collection[int] | None = None
    streams = False
    yardstick: Yardstick | None = None

    def __init__(self, initial_samples: int) -> None:
        self.initial_samples = initial_samples
        self.cost = Cost()

    @abc.abstractmethod
    def available(self, pool_size: int) -> int:
        """How many samples the next round would bring; 0: none."""

    @abc.abstractmethod
    def make(self, round: Round, done: int = 0) -> Iterator[SampleBatch]:
        """This rank's samples of a round, without its first ``done``. The learner is in eval mode
        meanwhile.
        """

    def omega(self, number: int) -> float:
        """The strength of the guidance in round ``number``, which is kept with its samples."""
        return 0.0

    def cfg_scale(self, number: int) -> float:
        """The scale of classifier-free guidance in round ``number``; 1: none."""
        return 1.0

    def steps(self, number: int) -> int:
        """The solver steps that a sample of round ``number`` takes."""
        return 1

    def release(self) -> None:  # noqa: B027
        """Gives back the memory that the making of a round leaves behind
        (``GuidedSampler.release``).
        """

    def added(self, upcoming: Round | None) -> None:  # noqa: B027
        """Hears that a round has been added; ``upcoming``: the next one, as it would be asked for
        now, or None where no more are added.
        """

    def stepped(self, step: int, upcoming: Callable[[], Round | None]) -> None:  # noqa: B027
        """Hears that ``step`` optimiser steps have been taken; ``upcoming`` gives the next round as
        it would be asked for now.
        """

    def close(self) -> None:  # noqa: B027
        """Hears that the loop is left, for whatever reason."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the source: names with tensors or values for JSON."""
        return {"cost": self.cost.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken."""
        self.cost.load_state_dict(state["cost"])


def balanced_labels(first_id: int, count: int, classes: int) -> Tensor:
    """(count,) labels: sample id i has label i mod classes."""
    return torch.arange(first_id, first_id + count) % classes


def allotted_labels(per_class: Tensor, first_id: int, count: int) -> Tensor:
    """(count,) labels in proportion to the classes' validation error; half of the samples are
    spread evenly.

    The even half keeps every class in the pool's balance, and a class without any error alive.
    Shares are rounded by largest remainder; labels take turns, so that any part of the round has
    about the same shares.
    """
    classes = len(per_class)
    error = (1 - per_class.double()).clamp(min=0)
    share = torch.full((classes,), 1 / classes, dtype=torch.float64)
    if float(error.sum()) > 0:
        share = 0.5 * share + 0.5 * error / error.sum()
    exact = share * count
    counts = exact.floor().long()
    rest = (exact - counts).argsort(descending=True, stable=True)[: count - int(counts.sum())]
    counts[rest] += 1
    labels = torch.arange(classes).repeat_interleave(counts)
    # the j-th of a class's n samples stands at (j + 1/2) / n of the round
    places = torch.cat([(torch.arange(int(n)) + 0.5) / int(n) for n in counts if n])
    return labels[places.argsort(stable=True)].roll(-(first_id % classes))


class Unguided:
    """Unguided samples by id, shared by the sources of an experiment: what a finished pool holds is
    not made again.

    A sample taken over costs what making one cost when it was made. A rank makes and shares its own
    part.
    """

    def __init__(self, recipe: Recipe, pipeline: Pipeline, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.batch, self.classes = recipe.generator.batch_size, pipeline.denoiser.classes
        self.sampler = new_sampler(recipe, pipeline, None)
        self.made = Cost()
        self._prices = Prices(new_sampler(recipe, pipeline, None, **EAGER), guided=False)
        self.yardstick = Yardstick(new_sampler(recipe, pipeline, None, **EAGER), self.batch, ranks)
        self._pools: list[tuple[SamplePool, dict[int, int]]] = []

    def remember(self, pool: SamplePool, cost: Cost) -> None:
        """Takes over the samples of round 0 of a finished pool, whose making is accounted for in
        ``cost``.

        Of a pool of pixels: latents and JPEG give back other images than were made.
        """
        if pool.codec != "pixels":
            return
        rows = torch.nonzero(pool.column("round") == 0).flatten()
        self._pools.append(
            (pool, dict(zip(pool.column("sample_id")[rows].tolist(), rows.tolist(), strict=True)))
        )
        if cost.samples > self.made.samples:
            self.made = replace(cost)

    def stream(
        self, first: int, count: int, cost: Cost, *, cfg_scale: float, turn: int = 0, done: int = 0
    ) -> Iterator[SampleBatch]:
        """This rank's samples (``Ranks.batches``) of the ids ``first`` to ``first + count``, paid
        for in ``cost``.
        """
        price = self._prices.at(cfg_scale)
        for places in self.ranks.batches(count, self.batch, turn=turn, done=done):
            start, size = first + places.start, len(places)
            known = self._known(start, size) if cfg_scale == self.sampler.cfg_scale else None
            if known is not None:
                cost.add(size, price, size * self.made.seconds / max(self.made.samples, 1))
                yield known
                continue
            labels = balanced_labels(start, size, self.classes)
            batches = self.sampler.stream(
                labels, first_id=start, batch_size=self.batch, cfg_scale=cfg_scale
            )
            for batch in cost.timed(batches, price):
                self.ranks.beat()
                yield batch

    def _known(self, first: int, count: int) -> SampleBatch | None:
        for pool, row_of in self._pools:
            if first in row_of and first + count - 1 in row_of:
                rows = torch.tensor([row_of[i] for i in range(first, first + count)])
                device = self.sampler.pipeline.device  # where a batch that is made lies
                return SampleBatch(
                    images=pool.images(rows).to(device),
                    labels=pool.column("label")[rows].to(device),
                    sample_ids=pool.column("sample_id")[rows].to(device),
                    entropy=torch.full((count,), float("nan"), device=device),
                )
        return None


class StaticSource(Source):
    """All samples at the start, unguided."""

    moments: Collection[int] | None = ()
    streams = True

    def __init__(self, recipe: Recipe, unguided: Unguided, total: int) -> None:
        super().__init__(total)
        self.recipe, self.unguided = recipe, unguided
        self.yardstick = unguided.yardstick

    def available(self, pool_size: int) -> int:
        return 0

    def make(self, round: Round, done: int = 0) -> Iterator[SampleBatch]:
        return self._unguided(round, done)

    def release(self) -> None:
        self.unguided.sampler.release()

    def _unguided(self, round: Round, done: int) -> Iterator[SampleBatch]:
        scale = self.cfg_scale(round.number)
        return self.unguided.stream(
            round.start, round.count, self.cost, cfg_scale=scale, turn=round.turn, done=done
        )

    def omega(self, number: int) -> float:
        return 0.0

    def cfg_scale(self, number: int) -> float:
        return scheduled(
            number, self.recipe.practice.cfg_scale_rounds, self.recipe.generator.cfg_scale
        )

    def steps(self, number: int) -> int:
        return self.recipe.generator.steps


class DynamicSource(StaticSource):
    """N unguided samples, then rounds of P unguided ones."""

    def __init__(
        self,
        recipe: Recipe,
        unguided: Unguided,
        learner: nn.Module,
        *,
        moments: Collection[int] | None = None,
    ) -> None:
        super().__init__(recipe, unguided, recipe.practice.initial_samples)
        self.learner, self.moments = learner, moments

    def available(self, pool_size: int) -> int:
        practice = self.recipe.practice
        return max(0, min(practice.round_samples, practice.maximum_samples - pool_size))

    def make(self, round: Round, done: int = 0) -> Iterator[SampleBatch]:
        if not round.number:
            return super().make(round, done)
        return self._more(round, done)

    def _more(self, round: Round, done: int) -> Iterator[SampleBatch]:
        for batch in self._unguided(round, done):
            yield self._judged(batch, round)

    def _judged(self, batch: SampleBatch, round: Round) -> SampleBatch:
        """``batch`` with the entropy under the learner of this moment; the time for it counts."""
        started = time.perf_counter()
        judged = replace(
            batch,
            entropy=entropy(predict(self.learner, batch.images)),
            learner_step=round.learner_step,
        )
        self.cost.seconds += time.perf_counter() - started
        return judged


class DeliberatePracticeSource(DynamicSource):
    """N unguided samples, then rounds of P that the learner of that moment guides.

    learner: whose entropy is recorded; guides: what guides, the same or a committee; pool: of the
    run, as it is then.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline,
        unguided: Unguided,
        learner: nn.Module,
        *,
        guides: nn.Module,
        pool: Callable[[], SamplePool],
    ) -> None:
        super().__init__(recipe, unguided, learner)
        self.sampler = new_sampler(recipe, pipeline, guides)
        self.way = guided_method(
            recipe, self.sampler, new_sampler(recipe, pipeline, guides, **EAGER), pool
        )

    def release(self) -> None:
        super().release()
        self.sampler.release()

    def omega(self, number: int) -> float:
        return (
            scheduled(number, self.recipe.practice.omega_rounds, self.recipe.guidance.omega)
            if number
            else 0.0
        )

    def steps(self, number: int) -> int:
        return self.way.steps if self.omega(number) else super().steps(number)

    def _more(self, round: Round, done: int) -> Iterator[SampleBatch]:
        if not self.omega(round.number):
            yield from super()._more(round, done)
            return
        wanted = RoundRequest(
            labels=self._labels(round),
            start=round.start,
            done=done,
            turn=round.turn,
            ranks=self.unguided.ranks,
            omega=self.omega(round.number),
            cfg_scale=self.cfg_scale(round.number),
            learner_step=round.learner_step,
        )
        yield from self.way.make(wanted, self.cost)

    def _labels(self, round: Round) -> Tensor:
        if self.recipe.practice.allot == "difficulty" and round.per_class is not None:
            return allotted_labels(round.per_class, round.start, round.count)
        return balanced_labels(round.start, round.count, self.unguided.classes)


class PruneSource(DynamicSource):
    """N unguided samples, then rounds of P: of ``oversample`` x P unguided candidates those of
    highest entropy.

    Candidates are scored by the learner of that moment and dropped when they are not kept. Ids
    count candidates.
    """

    streams = False  # what is kept is known when the last candidate has been scored

    def _more(self, round: Round, done: int) -> Iterator[SampleBatch]:
        ratio, initial = self.recipe.practice.oversample, self.initial_samples
        first, last = (
            initial + int(ratio * (size - initial))
            for size in (round.start, round.start + round.count)
        )
        scale = self.cfg_scale(round.number)
        held: list[Tensor] = []
        for batch in self.unguided.stream(first, last - first, self.cost, cfg_scale=scale):
            batch = self._judged(batch, round)
            columns = [batch.images, batch.labels, batch.sample_ids, batch.entropy]
            if batch.latents is not None and self.recipe.pool.codec == "latents":
                columns.append(batch.latents)
            columns = [column.cpu() for column in columns]  # a round is too much for the device
            held = (
                [torch.cat(pair) for pair in zip(held, columns, strict=True)] if held else columns
            )
            best = highest(held[3], held[1], round.count, within=self.recipe.practice.prune_within)
            held = [column[best] for column in held]  # who is out now would be out at the end
        for images, labels, ids, scores, *latents in zip(
            *(c.split(self.unguided.batch) for c in held), strict=True
        ):
            yield SampleBatch(
                images=images,
                labels=labels,
                sample_ids=ids,
                entropy=scores,
                learner_step=round.learner_step,
                latents=latents[0] if latents else None,
            )


def highest(scores: Tensor, labels: Tensor, count: int, *, within: str) -> Tensor:
    """Indices, rising, of the ``count`` highest of ``scores`` (n,): "overall", or as evenly as can
    be over "class"es.

    labels: (n,) int64, on the same device. Of equal scores the first are kept.
    """
    order = scores.argsort(descending=True, stable=True)
    if within == "class":
        labels = labels.gather(0, order)
        ordered, places = labels.sort(stable=True)  # class by class, the highest first
        rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
        ranks = torch.empty_like(order).scatter_(0, places, rank)
        order = order.gather(
            0, ranks.argsort(stable=True)
        )  # every class's best, then every class's second, ...
    return order.narrow(0, 0, min(count, len(order))).sort().values


def scheduled(number: int, values: tuple[float, ...], usual: float) -> float:
    """A schedule's value in round ``number``: the last one from its end on, ``usual`` in round 0
    and without one.
    """
    return values[min(number, len(values)) - 1] if number and values else usual
