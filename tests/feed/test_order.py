"""The order of the samples as a pool grows: a position is its whole state, no key is used twice."""

import pytest
import torch

from dpfast.feed.order import Order


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
