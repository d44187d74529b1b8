"""The yardstick of a round's entropy: which samples it is, and how they are made."""

import functools

import pytest
import torch

from dpfast.evaluate.measures import predict
from dpfast.generate.sampler import GuidedSampler
from dpfast.ops import entropy
from dpfast.parallel import ALONE, Ranks
from dpfast.sources.labels import LabelOrder
from dpfast.sources.yardstick import FIRST_ID, Yardstick, spread_labels

yardstick = functools.partial(Yardstick, labels=LabelOrder(3), samples=20)


@pytest.fixture
def sampler(pipeline):
    return GuidedSampler(pipeline, steps=2, compile=False)


def test_labels_are_spread_over_all_classes():
    assert spread_labels(250, LabelOrder(1000)).tolist() == list(range(0, 1000, 4))
    assert len(spread_labels(250, LabelOrder(300)).unique()) == 250
    assert spread_labels(250, LabelOrder(300)).max() == 298
    assert set(spread_labels(250, LabelOrder(100)).bincount().tolist()) == {2, 3}


def test_of_a_long_tail_labels_have_its_shares():
    order = LabelOrder(3, torch.tensor([600, 300, 100]))
    assert spread_labels(20, order).bincount().tolist() == [12, 6, 2]


@torch.no_grad()
def test_its_entropies_are_those_of_samples_that_no_pool_holds(sampler, learner):
    whole = sampler.generate(torch.arange(20) % 3, FIRST_ID + torch.arange(20)).images
    found = yardstick(sampler, 6, ALONE).entropies(learner)
    torch.testing.assert_close(found, entropy(predict(learner, whole)), rtol=1e-2, atol=1e-3)


def test_ranks_make_and_keep_their_parts(sampler):
    whole = torch.cat(yardstick(sampler, 100, ALONE).images)
    ranks = [Ranks(rank=rank, size=3) for rank in range(3)]
    parts = [yardstick(sampler, 100, rank) for rank in ranks]
    assert [len(torch.cat(part.images)) for part in parts] == [7, 7, 6]
    for part in parts:
        places = part.ranks.indices(20, part.batch)
        assert int((torch.cat(part.images).int() - whole[places].int()).abs().max()) <= 1


def test_a_rank_without_a_part_has_none(sampler):
    assert yardstick(sampler, 6, Ranks(rank=20, size=21)).images == []


def test_it_halves_its_batches_where_memory_runs_out(sampler, learner, monkeypatch):
    whole, finish = yardstick(sampler, 20, ALONE).entropies(learner), GuidedSampler.finish

    def limited(self, trajectory, **options):
        if len(trajectory) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return finish(self, trajectory, **options)

    monkeypatch.setattr(GuidedSampler, "finish", limited)
    tight = yardstick(sampler, 20, ALONE)
    torch.testing.assert_close(tight.entropies(learner), whole, rtol=1e-2, atol=1e-3)
    assert [len(images) for images in tight.images] == [5] * 4
