"""The source "dp": rounds of samples that the learner of that moment guides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dpfast.config import Guidance, Recipe
from dpfast.generate.criteria import Criterion
from dpfast.generate.from_recipe import new_sampler
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.pool.protocol import Pool
from dpfast.samples import SampleBatch
from dpfast.sources.dynamic import DynamicSource
from dpfast.sources.guided_methods import GuidedMethod, GuidedRequest, guided_method
from dpfast.sources.labels import allotted_labels
from dpfast.sources.source import RoundRequest
from dpfast.sources.strengths import Strengths
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
        self.pipeline, self.guides = pipeline, guides
        self.pool, self.criterion = pool, criterion
        self._strengths: dict[Guidance, Strengths] = {}
        self._methods: dict[tuple[Any, ...], GuidedMethod] = {}

    def release(self) -> None:
        super().release()
        for method in self._methods.values():
            method.sampler.release()

    def omega(self, number: int) -> float:
        return self.of_round(number).guidance.omega if number else 0.0

    def omega_of(self, number: int, labels: Tensor) -> float | Tensor:
        if not number:
            return 0.0
        omega: float | Tensor = self.strengths(number).rows(labels.cpu())["omega"]
        return omega

    def steps(self, number: int) -> int:
        return self.method(number).steps if self._is_guided(number) else super().steps(number)

    def _is_guided(self, number: int) -> bool:
        return bool(number) and self.strengths(number).guides

    def strengths(self, number: int) -> Strengths:
        """Returns the strengths by which the samples of round ``number`` are guided."""
        guidance = self.of_round(number).guidance
        if guidance not in self._strengths:
            self._strengths[guidance] = Strengths.of(guidance, self.pipeline.class_names)
        return self._strengths[guidance]

    def method(self, number: int) -> GuidedMethod:
        """Returns the method by which the samples of round ``number`` are made. Rounds that differ
        in no more than what a sampler is told with its samples have one.
        """
        recipe = self.of_round(number)
        told = ("omega", "anchor") if isinstance(self.pipeline, Pipeline) else ("omega",)
        key = tuple(value for name, value in vars(recipe.guidance).items() if name not in told)
        if key not in self._methods:
            # the round's scale is told with its samples
            options: dict[str, Any] = {
                "criterion": self.criterion,
                "cfg_scale": self.recipe.generator.cfg_scale,
            }
            sampler = new_sampler(recipe, self.pipeline, self.guides, **options)
            eager = new_sampler(recipe, self.pipeline, self.guides, **options, **EAGER)
            self._methods[key] = guided_method(recipe, sampler, eager, self.pool)
        return self._methods[key]

    def _later(self, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        number = request.number
        if not self._is_guided(number):
            yield from super()._later(request, done)
            return
        strengths = self.strengths(number)
        if not isinstance(self.pipeline, Pipeline):  # its sampler has the round's anchor
            strengths = replace(strengths, anchor=None)
        wanted = GuidedRequest(
            labels=self._labels(request),
            start=request.start,
            done=done,
            turn=request.turn,
            ranks=self.unguided.ranks,
            strengths=strengths,
            cfg_scale=self.cfg_scale(number),
            learner_step=request.learner_step,
        )
        yield from self.method(number).make(wanted, self.cost)

    def _labels(self, request: RoundRequest) -> Tensor:
        if self.recipe.practice.allot == "difficulty" and request.per_class is not None:
            return allotted_labels(request.per_class, request.start, request.count)
        return self.unguided.labels.between(request.start, request.count)
