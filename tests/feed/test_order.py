"""The keyed permutation: exact, the same in C++ and Python, a shuffle by its statistics; the order
as a pool grows.
"""

import math

import pytest
import torch

from dpfast.feed.order import Order, permutation, reference
from dpfast.ops import dispatch

FIRST_SIX = [2, 5, 1, 6, 4, 7]


def chi_square(counts, expected):
    """Distance from uniform counts in standard deviations of the statistic."""
    freedom = counts.numel() - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4097])
def test_a_pass_is_a_permutation(size):
    drawn = permutation(0, size, size, seed=7, epoch=3)
    assert torch.equal(drawn.sort().values, torch.arange(size))


@pytest.mark.skipif(dispatch.native() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("size", [1, 5, 100, 65_537, 6_500_000, (1 << 33) + 5, 1 << 62])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**31 - 1, 12), (2**64 - 1, 2**40)])
def test_native_and_reference_agree_bit_by_bit(size, seed, epoch, monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", "native")
    count = min(size, 3000)
    first = (size - count) // 2
    native = permutation(first, count, size, seed=seed, epoch=epoch)
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    assert torch.equal(native, permutation(first, count, size, seed=seed, epoch=epoch))
    assert 0 <= int(native.min()) <= int(native.max()) < size


def test_the_permutation_is_the_documented_one():
    """A saved position stays valid only while these integers do."""
    assert permutation(0, 6, 10, seed=1, epoch=0).tolist() == FIRST_SIX
    assert reference(torch.tensor([5, 0]), 10, seed=1, epoch=0).tolist() == [
        FIRST_SIX[5],
        FIRST_SIX[0],
    ]


def test_all_orders_of_few_samples_are_equally_frequent():
    """Small sizes are the hard case of a Feistel network; 24 and 120 orders, 200 expected of
    each.
    """
    for size in (4, 5):
        orders = math.factorial(size)
        places = size ** torch.arange(size)
        codes = torch.tensor(
            [
                int((permutation(0, size, size, seed=0, epoch=e) * places).sum())
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
    passes = torch.stack([permutation(0, 100, 100, seed=5, epoch=e) for e in range(4000)])
    for place in (0, 1, 50, 99):
        assert abs(chi_square(torch.bincount(passes[:, place], minlength=100), 40)) < 4
    steps = (passes[:, 1:] - passes[:, :-1]) % 100
    assert abs(chi_square(torch.bincount(steps.flatten(), minlength=100)[1:], 4000.0)) < 4
    # Two passes, and two seeds, agree in as many places as two shuffles: one on average.
    same = (passes[1:] == passes[:-1]).sum(1).float().mean()
    assert abs(float(same) - 1) < 0.1
    other = torch.stack([permutation(0, 100, 100, seed=6, epoch=e) for e in range(4000)])
    assert abs(float((passes == other).sum(1).float().mean()) - 1) < 0.1


def test_the_position_is_the_whole_state():
    """Any batch of a long run follows from four integers, also right after growth and in weighted
    passes.
    """
    for weight in (1.0, 3.0):
        order, twin = Order(3, 9, fresh_weight=weight), Order(3, 9, fresh_weight=weight)
        sizes = [(40, 0)] * 11 + [(55, 15)] * 7 + [(60, 5)] * 8
        for step, (size, fresh) in enumerate(sizes):
            twin.load_state_dict(order.state_dict())
            assert torch.equal(order.next(size, fresh), twin.next(size, fresh)), step
        for count in (1, 5, 2):
            several = order.next(60, 5, batches=count)
            for left, part in zip(reversed(range(count)), several.split(9), strict=True):
                assert torch.equal(part, twin.next(60, 5))
                assert order.state_dict(before=left) == twin.state_dict()
        assert set(order.state_dict()) == {"epoch", "position", "size", "fresh"}


def test_growth_uses_no_key_twice():
    """Passes before and after a growth are independent, though both began in the middle of a
    pass.
    """
    order, seen = Order(0, 7), []
    for size in (20, 21, 22, 200):
        for _ in range(5):
            order.next(size)
            seen.append((order.epoch + (order.position - 1) // size, size))
    assert all(e != f for e, n in seen for f, m in seen if n != m)


def test_the_newest_samples_are_drawn_as_often_as_their_weight_says():
    order = Order(1, 32, fresh_weight=4.0)
    drawn = torch.cat([order.next(1000, 100) for _ in range(1000)])
    counts = torch.bincount(drawn, minlength=1000)
    # 4 * 100 of 4 * 100 + 900 draws go to the newest, each as often as the others of its kind
    assert int(counts[900:].sum()) == pytest.approx(32_000 * 400 / 1300, abs=2)
    assert int(counts[900:].max() - counts[900:].min()) <= 1
    assert int(counts[:900].max() - counts[:900].min()) <= 1
    batch = Order(1, 32, fresh_weight=4.0).next(1000, 100)
    assert int((batch >= 900).sum()) in (9, 10)  # every batch holds its share


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="empty"):
        Order(0, 4).next(0)
    with pytest.raises(ValueError, match="fresh_weight = 0"):
        Order(0, 4, fresh_weight=0)
    with pytest.raises(TypeError, match="batch_size must be an integer, got '8'"):
        Order(0, "8")
    with pytest.raises(TypeError, match="seed must be an integer, got "):
        Order(0.5, 8)
    with pytest.raises(ValueError, match="batch_size = 0"):
        Order(0, 0)
    with pytest.raises(ValueError, match="fresh = 11"):
        Order(0, 4).next(10, 11)
    with pytest.raises(ValueError, match="places 5 to 11 of 10"):
        permutation(5, 6, 10, seed=0, epoch=0)
