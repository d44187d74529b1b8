"""The source "dp": rounds of samples that the learner of that moment guides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.generate.criteria import Criterion
from dpfast.generate.from_recipe import new_sampler
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.pool.protocol import Pool
from dpfast.samples import SampleBatch
from dpfast.sources.dynamic import DynamicSource
from dpfast.sources.guided_methods import GuidedRequest, guided_method
from dpfast.sources.labels import allotted_labels
from dpfast.sources.source import RoundRequest, scheduled
from dpfast.sources.unguided import EAGER, UnguidedSamples


class DeliberatePracticeSource(DynamicSource):
    """N unguided samples, then rounds of P that the learner of that moment guides.

    learner: whose entropy is recorded; guides: what guides, the same or a committee; pool: of the
    run, as it is then; criterion: what guidance raises, in place of the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline | OwnPipeline,
        unguided: UnguidedSamples,
        learner: nn.Module,
        *,
        guides: nn.Module,
        pool: Callable[[], Pool],
        criterion: Criterion | None = None,
        moments: Collection[int] | None = None,
    ) -> None:
        super().__init__(recipe, unguided, learner, moments=moments)
        self.pipeline = pipeline
        self.sampler = new_sampler(recipe, pipeline, guides, criterion=criterion)
        eager = new_sampler(recipe, pipeline, guides, criterion=criterion, **EAGER)
        self.method = guided_method(recipe, self.sampler, eager, pool)

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
        return self.method.steps if self.omega(number) else super().steps(number)

    def _later(self, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        if not self.omega(request.number):
            yield from super()._later(request, done)
            return
        wanted = GuidedRequest(
            labels=self._labels(request),
            start=request.start,
            done=done,
            turn=request.turn,
            ranks=self.unguided.ranks,
            omega=self.omega(request.number),
            cfg_scale=self.cfg_scale(request.number),
            learner_step=request.learner_step,
        )
        yield from self.method.make(wanted, self.cost)

    def _labels(self, request: RoundRequest) -> Tensor:
        if self.recipe.practice.allot == "difficulty" and request.per_class is not None:
            return allotted_labels(request.per_class, request.start, request.count)
        return self.unguided.labels.between(request.start, request.count)
