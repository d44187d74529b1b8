"""Which label a sample id has: balanced, or towards class counts."""

import pytest
import torch
from torch.nn.functional import one_hot

from dpfast.sources.labels import LabelOrder


def test_without_counts_and_with_equal_ones_labels_take_turns():
    ids = torch.tensor([0, 1, 7, 90, 91, 10**9, (1 << 40) + 3])
    assert LabelOrder(7).of(ids).tolist() == [i % 7 for i in ids.tolist()]
    for each in (1, 13):
        equal = LabelOrder(7, torch.full((7,), each))
        assert torch.equal(equal.of(ids), LabelOrder(7).of(ids))


@pytest.mark.parametrize("seed", range(30))
def test_every_prefix_holds_its_share_of_each_class_rounded_down_or_up(seed):
    """Of a few classes and many, without samples, with one, and with most of them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 60, (1 + seed,), generator=generator)
    counts[torch.rand(len(counts), generator=generator) < 0.2] = 0
    counts[0] = 1 + seed * 20
    total = int(counts.sum())
    labels = LabelOrder(len(counts), counts).between(0, total)
    found = one_hot(labels, len(counts)).cumsum(0)
    share = torch.arange(1, total + 1)[:, None] * counts
    assert bool((found >= share // total).all())
    assert bool((found <= -(-share // total)).all())
    assert torch.equal(found[-1], counts)


def test_labels_repeat_behind_the_target():
    order = LabelOrder(3, torch.tensor([4, 6, 0]))
    assert order.between(0, 10).bincount(minlength=3).tolist() == [4, 6, 0]
    assert torch.equal(order.between(0, 10), order.between(30, 10))
    assert torch.equal(order.of(torch.tensor([3, 13, 33])), order.of(torch.tensor([3, 3, 3])))
