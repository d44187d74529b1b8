"""The source "static": all samples at the start."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from dpfast.config import Recipe
from dpfast.samples import SampleBatch
from dpfast.sources.source import RoundRequest, Source
from dpfast.sources.unguided import UnguidedSamples


class StaticSource(Source):
    """All samples at the start, unguided."""

    moments: Collection[int] | None = ()
    streams = True

    def __init__(self, recipe: Recipe, unguided: UnguidedSamples, total: int) -> None:
        super().__init__(total)
        self.recipe, self.unguided = recipe, unguided
        self._rounds: dict[int, Recipe] = {}
        self.yardstick = unguided.yardstick

    def available(self, pool_size: int) -> int:
        return 0

    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        return self._unguided(request, done)

    def release(self) -> None:
        self.unguided.sampler.release()

    def _unguided(self, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        scale = self.cfg_scale(request.number)
        return self.unguided.stream(
            request.start, request.count, self.cost, cfg_scale=scale, turn=request.turn, done=done
        )

    def omega(self, number: int) -> float:
        return 0.0

    def cfg_scale(self, number: int) -> float:
        return self.of_round(number).generator.cfg_scale

    def of_round(self, number: int) -> Recipe:
        """The recipe of round ``number``."""
        number = min(number, self.recipe.scheduled_rounds)
        if number not in self._rounds:
            self._rounds[number] = self.recipe.of_round(number)
        return self._rounds[number]

    def steps(self, number: int) -> int:
        return self.recipe.generator.steps
