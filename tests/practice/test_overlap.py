"""When the generators beside a training are given its learner."""

from types import SimpleNamespace

import pytest
import torch

from dpfast.generate.pipelines import Pipeline
from dpfast.practice.overlap import OverlappedSource
from dpfast.sources.costs import Cost
from dpfast.sources.source import RoundRequest
from tests.practice.test_loop import with_


def published(recipe, moments, *, staleness, steps, rounds):
    """The steps after which the learner is published in a training that adds after ``rounds``, and
    the ages of the learners of these.
    """
    recipe = with_(recipe, "practice", overlap_staleness=staleness)
    own = SimpleNamespace(
        initial_samples=30,
        cost=Cost(),
        yardstick=None,
        moments=moments,
        recipe=recipe,
        pipeline=Pipeline.from_pretrained(recipe.generator.pipeline),
    )
    groups = SimpleNamespace(trainers=SimpleNamespace(first=False))
    source = OverlappedSource(own, torch.nn.Linear(1, 1), groups)
    found, ages, number = [], [], 1

    def upcoming(step):
        if number > len(rounds):
            return None
        return RoundRequest(number=number, start=30, count=15, learner_step=step)

    def noted():
        if source._published == len(found):
            found.append(source.job.learner_step)

    source.added(upcoming(0))
    noted()
    for step in range(1, steps + 1):
        source.stepped(step, lambda step=step: upcoming(step))
        noted()
        if step in rounds:
            ages.append(step - source.job.learner_step)
            number += 1
            source.added(upcoming(step))
            noted()
    return found, ages


@pytest.mark.parametrize(
    ("moments", "staleness", "steps"),
    [
        ((250, 350), 50, [200, 300]),
        ((250, 350), 100, [150, 250]),
        ((250, 350), 99, [151, 251]),
        ((250, 350), 1000, [0, 250]),
        ((1, 2, 99), 1, [0, 1, 98]),
    ],
)
def test_a_learner_is_published_once_for_each_known_step(recipe, moments, staleness, steps):
    """A learner that would be too old then is not: what it guided would be thrown away."""
    found, ages = published(recipe, moments, staleness=staleness, steps=400, rounds=moments)
    assert found == steps
    assert ages == [step - born for step, born in zip(moments, steps, strict=True)]
    assert max(ages) <= staleness


def test_by_patience_a_learner_is_published_for_each_evaluation_it_may_reach(recipe):
    """Evaluations come every 5 steps, and rounds after 10 and 15."""
    found, ages = published(recipe, None, staleness=2, steps=40, rounds=(10, 15))
    assert (found, ages) == ([3, 8, 13], [2, 2])
    found, ages = published(recipe, None, staleness=7, steps=40, rounds=(10, 15))
    assert (found, ages) == ([0, 6, 10], [4, 5])
