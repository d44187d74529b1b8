"""The source "dynamic": the rounds of Deliberate Practice, unguided; the timing alone."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import replace

from torch import nn

from dpfast.config import Recipe
from dpfast.evaluate.measures import predict
from dpfast.ops import entropy
from dpfast.samples import SampleBatch
from dpfast.sources.source import RoundRequest
from dpfast.sources.static import StaticSource
from dpfast.sources.unguided import UnguidedSamples


class DynamicSource(StaticSource):
    """N unguided samples, then rounds of P unguided ones."""

    def __init__(
        self,
        recipe: Recipe,
        unguided: UnguidedSamples,
        learner: nn.Module,
        *,
        moments: Collection[int] | None = None,
    ) -> None:
        super().__init__(recipe, unguided, recipe.practice.initial_samples)
        self.learner, self.moments = learner, moments

    def available(self, pool_size: int) -> int:
        practice = self.recipe.practice
        return max(0, min(practice.round_samples, practice.maximum_samples - pool_size))

    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        if not request.number:
            return super().make(request, done)
        return self._later(request, done)

    def _later(self, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        for batch in self._unguided(request, done):
            yield self._judged(batch, request)

    def _judged(self, batch: SampleBatch, request: RoundRequest) -> SampleBatch:
        """Returns ``batch`` with the entropy under the learner of this moment; the time for it
        counts.
        """
        started = time.perf_counter()
        judged = replace(
            batch,
            entropy=entropy(predict(self.learner, batch.images)),
            learner_step=request.learner_step,
        )
        self.cost.seconds += time.perf_counter() - started
        return judged
