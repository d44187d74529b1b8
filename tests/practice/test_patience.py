"""Patience: when it asks for samples and how it grows with the pool."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.studies import patience as bench
from dpfast.config import Recipe
from dpfast.practice.patience import Patience


def test_asks_after_the_limit_without_a_new_best():
    patience = Patience(initial=3, initial_samples=100, growth="fixed")
    assert [patience.update(a, 100) for a in (0.5, 0.4, 0.5, 0.3)] == [False, False, False, True]


def test_a_new_best_starts_the_count_again():
    patience = Patience(initial=2, initial_samples=100)
    assert [patience.update(a, 100) for a in (0.5, 0.4, 0.6, 0.6, 0.5)] == [
        False,
        False,
        False,
        False,
        True,
    ]
    patience.added()
    assert patience.waited == 0
    assert patience.best == 0.6


def test_the_limit_grows_with_the_pool():
    patience = Patience(initial=2, initial_samples=100, growth="pool")
    assert [patience.limit(n) for n in (100, 150, 151, 200, 1000)] == [2, 3, 4, 4, 20]
    assert Patience(initial=2, initial_samples=100, growth="fixed").limit(1000) == 2


def test_the_limit_may_grow_by_one_a_round():
    patience = Patience(initial=2, initial_samples=100, growth="round")
    limits = []
    for size in (100, 1000, 5000):
        limits.append(patience.limit(size))
        patience.added()
    assert limits == [2, 3, 4]


def test_the_state_survives_json():
    patience = Patience(initial=2, initial_samples=100)
    fresh = json.loads(json.dumps(patience.state_dict()))
    patience.update(0.5, 100)
    patience.added()
    other = Patience(initial=2, initial_samples=100)
    other.load_state_dict(json.loads(json.dumps(patience.state_dict())))
    assert other == patience
    other.load_state_dict(fresh)
    assert other == Patience(initial=2, initial_samples=100)


def test_coverage_draws_a_quarter_of_the_pool_before_an_addition():
    patience = Patience(initial=5, initial_samples=130)
    assert [patience.limit(130 * times) for times in (1, 20, 21, 24, 40)] == [5, 5, 6, 6, 10]
    assert [Patience(1, 100).limit(size) for size in (100, 400, 401, 900)] == [1, 1, 2, 3]
    assert all(patience.limit(size) * 130 >= size / 4 for size in range(130, 10_000))


def test_a_fit_needs_the_sum_of_the_waits_within_the_epochs_of_every_span():
    assert bench.fits(lambda *_: 1)
    assert {name for name in bench.SHIPPED if bench.fits(bench.RULES[name])} == {
        "coverage",
        "fixed",
    }
    (last,) = [
        span
        for run in bench.RUNS
        for span in bench.spans(run)
        if (span.first, span.last) == (28, 47)
    ]
    assert last.evaluations == 618 - 494 + 1
    assert [last.least(bench.RULES[name]) for name in bench.SHIPPED] == [110, 1955, 850, 100]


def test_a_quarter_is_the_largest_share_of_the_pool_that_the_tables_allow():
    def covers(share):
        return lambda first, times, _: max(first, math.ceil(times * share))

    assert [bench.fits(covers(1 / parts)) for parts in (2, 3, 4, 5)] == [False, False, True, True]


def test_every_run_of_the_tables_has_its_branches_before_the_cool_down():
    for run in bench.RUNS:
        assert all(epoch <= run.passes for epoch in run.branches.values()), run


@pytest.mark.parametrize("name", ["imagenet100-sd15", "imagenet1k-sd15", "imagenet1k-dit"])
def test_recipes_of_the_papers_size_reach_their_samples(name):
    recipe = Recipe.load(name)
    growth, most = recipe.practice.patience_growth, recipe.practice.maximum_samples
    ends = [
        bench.samples_reached(recipe, growth, n, p, 0) for n in bench.NOISES for p in bench.PACES
    ]
    assert ends == [most] * len(ends)


def test_the_rule_that_keeps_the_passes_over_the_pool_does_not_reach_them():
    recipe = Recipe.load("imagenet100-sd15")
    assert bench.samples_reached(recipe, "pool", 0.002, 0.02, 0) < recipe.practice.maximum_samples


def test_the_documented_tables_are_those_of_the_command():
    text = (Path(__file__).parents[2] / "docs" / "background" / "patience.md").read_text()
    assert bench.rules_table() in text
    assert bench.reached_table("imagenet100-sd15") in text
