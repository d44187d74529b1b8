"""Patience: when it asks for samples and how it grows with the pool."""

import json

from dpfast.practice.patience import Patience


def test_asks_after_the_limit_without_a_new_best():
    patience = Patience(initial=3, initial_samples=100, growth="fixed")
    assert [patience.update(a, 100) for a in (0.5, 0.4, 0.5, 0.3)] == [False, False, False, True]


def test_a_new_best_starts_the_count_again():
    patience = Patience(initial=2, initial_samples=100)
    assert [patience.update(a, 100) for a in (0.5, 0.4, 0.6, 0.6, 0.5)] == [False, False, False, False, True]
    patience.added()
    assert patience.waited == 0
    assert patience.best == 0.6


def test_the_limit_grows_with_the_pool():
    patience = Patience(initial=2, initial_samples=100)
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
    fresh = json.loads(json.dumps(patience.state()))
    patience.update(0.5, 100)
    patience.added()
    other = Patience(initial=2, initial_samples=100)
    other.restore(json.loads(json.dumps(patience.state())))
    assert other == patience
    other.restore(fresh)
    assert other == Patience(initial=2, initial_samples=100)
