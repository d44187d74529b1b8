"""Patience: when it asks for samples and how it grows with the pool."""

from dpfast.practice.patience import Patience


def test_asks_after_the_limit_without_a_new_best():
    patience = Patience(initial=3, initial_samples=100, growth="fixed")
    assert [patience.update(a, 100) for a in (0.5, 0.4, 0.5, 0.3)] == [False, False, False, True]


def test_a_new_best_starts_the_count_again():
    patience = Patience(initial=2, initial_samples=100)
    assert [patience.update(a, 100) for a in (0.5, 0.4, 0.6, 0.6, 0.5)] == [False, False, False, False, True]
    patience.reset()
    assert patience.waited == 0
    assert patience.best == 0.6


def test_the_limit_grows_with_the_pool():
    patience = Patience(initial=2, initial_samples=100)
    assert [patience.limit(n) for n in (100, 150, 151, 200, 1000)] == [2, 3, 4, 4, 20]
    assert Patience(initial=2, initial_samples=100, growth="fixed").limit(1000) == 2
