"""The keyed permutation: exact, the same in C++ and Python, a shuffle by its statistics."""

import functools
import math

import pytest
import torch

from dpfast.ops import dispatch
from dpfast.ops.permutation import permutation, reference

STREAM = 0x6F726472  # of the order of the samples
FIRST_SIX = [2, 5, 1, 6, 4, 7]
draw = functools.partial(permutation, stream=STREAM)


def chi_square(counts, expected):
    """Distance from uniform counts in standard deviations of the statistic."""
    freedom = counts.numel() - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4097])
def test_a_pass_is_a_permutation(size):
    drawn = draw(0, size, size, seed=7, epoch=3)
    assert torch.equal(drawn.sort().values, torch.arange(size))


@pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("size", [1, 5, 100, 65_537, 6_500_000, (1 << 33) + 5, 1 << 62])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**31 - 1, 12), (2**64 - 1, 2**40)])
def test_native_and_reference_agree_bit_by_bit(size, seed, epoch, monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", "native")
    count = min(size, 3000)
    first = (size - count) // 2
    native = draw(first, count, size, seed=seed, epoch=epoch)
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    assert torch.equal(native, draw(first, count, size, seed=seed, epoch=epoch))
    assert 0 <= int(native.min()) <= int(native.max()) < size


def test_the_permutation_is_the_documented_one():
    """A saved position stays valid only while these integers do."""
    assert draw(0, 6, 10, seed=1, epoch=0).tolist() == FIRST_SIX
    some = reference(torch.tensor([5, 0]), 10, seed=1, epoch=0, stream=STREAM)
    assert some.tolist() == [FIRST_SIX[5], FIRST_SIX[0]]


def test_all_orders_of_few_samples_are_equally_frequent():
    """Small sizes are the hard case of a Feistel network; 24 and 120 orders, 200 expected of
    each.
    """
    for size in (4, 5):
        orders = math.factorial(size)
        places = size ** torch.arange(size)
        codes = torch.tensor(
            [
                int((draw(0, size, size, seed=0, epoch=e) * places).sum())
                for e in range(orders * 200)
            ]
        )
        counts = torch.unique(codes, return_counts=True)[1]
        assert len(counts) == orders
        assert abs(chi_square(counts, 200)) < 5


def test_places_and_neighbours_are_uniform():
    """Over 4000 passes of 100 samples: each place, and the step from one place to the next, is
    uniform.
    """
    passes = torch.stack([draw(0, 100, 100, seed=5, epoch=e) for e in range(4000)])
    for place in (0, 1, 50, 99):
        assert abs(chi_square(torch.bincount(passes[:, place], minlength=100), 40)) < 4
    steps = (passes[:, 1:] - passes[:, :-1]) % 100
    assert abs(chi_square(torch.bincount(steps.flatten(), minlength=100)[1:], 4000.0)) < 4
    # Two passes, and two seeds, agree in as many places as two shuffles: one on average.
    same = (passes[1:] == passes[:-1]).sum(1).float().mean()
    assert abs(float(same) - 1) < 0.1
    other = torch.stack([draw(0, 100, 100, seed=6, epoch=e) for e in range(4000)])
    assert abs(float((passes == other).sum(1).float().mean()) - 1) < 0.1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="places 5 to 11 of 10"):
        draw(5, 6, 10, seed=0, epoch=0)
