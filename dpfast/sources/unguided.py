"""Unguided samples, which the sources of an experiment share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpfast.config import Recipe
from dpfast.data.class_counts import class_counts
from dpfast.generate.from_recipe import new_sampler
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.pool import SamplePool
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost, Prices
from dpfast.sources.labels import LabelOrder
from dpfast.sources.reuse import ReusedSamples
from dpfast.sources.yardstick import Yardstick

log = logging.getLogger(__name__)
EAGER: dict[str, Any] = {"compile": False, "cuda_graphs": False}  # for few samples


class UnguidedSamples:
    """Unguided samples by id, shared by the sources of an experiment: what a finished pool holds is
    not made again.

    A sample taken over costs what making one cost when it was made. A rank makes and shares its own
    part. reused: what another run has saved.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline | OwnPipeline,
        ranks: Ranks = ALONE,
        *,
        reused: ReusedSamples | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.ranks = ranks
        self.batch = recipe.generator.batch_size
        self.classes = len(pipeline.class_names)
        counts = class_counts(recipe.practice, pipeline.class_names)
        self.labels = LabelOrder(self.classes, counts)
        self.cfg_scale = recipe.generator.cfg_scale
        self.sampler = new_sampler(recipe, pipeline, None)
        self.made = Cost()
        self._prices = Prices(new_sampler(recipe, pipeline, None, **EAGER), guided=False)
        self.yardstick = Yardstick(
            new_sampler(recipe, pipeline, None, **EAGER),
            self.batch,
            ranks,
            labels=self.labels,
            samples=recipe.practice.yardstick_samples,
        )
        self._reused = reused
        self.taken = 0  # of the round that is made, those that exist
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
        self,
        first: int,
        count: int,
        cost: Cost,
        *,
        cfg_scale: float,
        turn: int = 0,
        done: int = 0,
        ids: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[SampleBatch]:
        """Yields this rank's samples (``Ranks.batches``) of the ids ``first`` to ``first + count``,
        or of those that ``ids`` gives for the numbers 0 to ``count``, paid for in ``cost``.
        """
        with self.told():
            for indices in self.ranks.batches(count, self.batch, turn=turn, done=done):
                numbers = torch.arange(indices.start, indices.stop)
                wanted = first + numbers if ids is None else ids(numbers)
                yield from self.of(wanted, cost, cfg_scale=cfg_scale)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Says at the end of a ``with`` block how many of the samples ``of`` it exist; with those
        of another run in any case.
        """
        self.taken = 0
        yield
        if self.taken or self._reused is not None:
            log.info("%d samples exist already and were not made again", self.taken)

    def of(self, ids: Tensor, cost: Cost, *, cfg_scale: float) -> Iterator[SampleBatch]:
        """Yields the samples ``ids`` (n,), at most a batch, paid for in ``cost``: all of them made,
        unless all of them exist.
        """
        price = self._prices.at(cfg_scale)
        known, seconds = self._known(ids, cfg_scale)
        if known is not None:
            self.taken += len(ids)
            cost.add(len(ids), price, len(ids) * seconds)
            self.ranks.beat()
            yield known
            return
        batches = self.sampler.stream(
            self.labels.of(ids), sample_ids=ids, batch_size=self.batch, cfg_scale=cfg_scale
        )
        for batch in cost.timed(batches, price):
            self.ranks.beat()
            yield batch

    def _known(self, ids: Tensor, cfg_scale: float) -> tuple[SampleBatch | None, float]:
        """Returns the samples where all of them exist, and the seconds that each of them took."""
        images = None
        seconds = self.made.seconds / max(self.made.samples, 1)
        for pool, row_of in self._pools if cfg_scale == self.cfg_scale else ():
            if images is None and all(number in row_of for number in ids.tolist()):
                images = pool.images(torch.tensor([row_of[number] for number in ids.tolist()]))
        if images is None and self._reused is not None:
            images, seconds = self._reused.images(ids, cfg_scale), self._reused.seconds
        if images is None:
            return None, 0.0
        device = self.pipeline.device  # where a batch that is made lies
        batch = SampleBatch(
            images=images.to(device),
            labels=self.labels.of(ids).to(device),
            sample_ids=ids.to(device),
            entropy=torch.full((len(ids),), float("nan"), device=device),
        )
        return batch, seconds
