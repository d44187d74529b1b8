"""The source "static": all samples at the start."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from dpfast.config import Recipe
from dpfast.samples import SampleBatch
from dpfast.sources.existing import Existing
from dpfast.sources.source import RoundRequest, Source
from dpfast.sources.unguided import UnguidedSamples


class StaticSource(Source):
    """All samples at the start, unguided.

    ``real``: images in the place of the first ones of them; with those any source of this kind is
    the source "mix".
    """

    moments: Collection[int] | None = ()
    streams = True

    def __init__(self, recipe: Recipe, unguided: UnguidedSamples, total: int) -> None:
        super().__init__(total)
        self.recipe, self.unguided = recipe, unguided
        self._rounds: dict[int, Recipe] = {}
        self.yardstick = unguided.yardstick
        self.real: Existing | None = None

    def available(self, pool_size: int) -> int:
        return 0

    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        return self._unguided(request, done)

    def release(self) -> None:
        self.unguided.sampler.release()

    def _unguided(self, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        scale = self.cfg_scale(request.number)
        if self.real is not None and not request.number:
            return self._beside(self.real, request, done)
        return self.unguided.stream(
            request.start, request.count, self.cost, cfg_scale=scale, turn=request.turn, done=done
        )

    def _beside(self, real: Existing, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        """Yields the initial samples, the first ones of which are real."""
        unguided = self.unguided
        turn, scale = request.turn, self.cfg_scale(0)
        batches = unguided.ranks.batches(request.count, unguided.batch, turn=turn, done=done)
        with unguided.told():
            for places in batches:
                first = min(max(places.start, len(real)), places.stop)  # that is made
                if places.start < first:
                    yield real.batch(range(places.start, first))
                if first < places.stop:
                    made = torch.arange(first, places.stop)
                    yield from unguided.of(made, self.cost, cfg_scale=scale)

    def drawn(self, number: int) -> tuple[int, float] | None:
        shares = self.recipe.practice.real_in_batch
        if self.real is None or not shares:
            return None
        return len(self.real), shares[min(max(number, 0), len(shares) - 1)]

    def omega(self, number: int) -> float:
        return 0.0

    def cfg_scale(self, number: int) -> float:
        return self.of_round(number).generator.cfg_scale

    def of_round(self, number: int) -> Recipe:
        """Returns the recipe of round ``number``."""
        number = min(number, self.recipe.scheduled_rounds)
        if number not in self._rounds:
            self._rounds[number] = self.recipe.of_round(number)
        return self._rounds[number]

    def steps(self, number: int) -> int:
        return self.recipe.generator.steps
