"""In which order ranks call collectives, and which are in flight together: real processes, delayed
at random.
"""

import random
import time

import torch

from dpfast.config import Learner
from dpfast.feed.torch_loader import TorchLoader
from dpfast.learn.trainer import Trainer
from dpfast.parallel.groups import Group
from dpfast.parallel.ranks import side_groups
from dpfast.parallel.recorder import CollectiveRecorder
from dpfast.pool.sharded import ShardedPool, ShardLayout
from tests.parallel.test_ranks import AUGMENT, BATCH, ROUNDS, learner, pool_of
from tests.ranks import spawned


def trained(ranks, *, background):
    """Twelve steps of training on batches that ranks exchange."""
    layout = ShardLayout(ranks, BATCH, ROUNDS)
    pool = ShardedPool(pool_of("pixels", layout, ranks.rank), layout)
    model = learner()
    model(torch.zeros(2, 3, 16, 12))
    trainer = Trainer(model, Learner(lr=1e-2, precision="fp32"), iterations=20, ranks=ranks)
    loader = TorchLoader(
        pool, batch_size=24, seed=5, augment=AUGMENT, classes=7, background=background
    )
    for _ in range(12):
        trainer.step(*next(loader))
    loader.close()


def in_order(ranks):
    chance = random.Random(ranks.rank)

    def delay():
        time.sleep(chance.choice((0.0, 0.0, 0.005, 0.01)))

    plain = ranks.learn, ranks.control, ranks.feed
    # as on a GPU: one communicator, and one thread that issues
    assert side_groups(range(2), 60, ranks.learn, True)[1]["cuda"] is ranks.learn
    ranks.feed = {"cpu": ranks.learn}
    recorder = CollectiveRecorder(delay)
    recorder.record(ranks)
    trained(ranks, background=False)
    assert {group for group, _, _ in recorder.order} == {"learn", "control"}
    assert [kind for group, kind, _ in recorder.order if group == "learn"].count(
        "all_to_all"
    ) == 14  # two ahead
    shapes = [
        [group, kind] for group, kind, _ in recorder.order
    ]  # parts of a batch differ in their bytes
    assert all(order == shapes for order in ranks.all_gather_object(shapes))
    assert not recorder.overlaps()
    # as on a CPU: gloo's groups have connections of their own, and the loader's thread talks
    # meanwhile
    ranks.learn, ranks.control, ranks.feed = plain
    recorder = CollectiveRecorder(delay)
    recorder.record(ranks)
    trained(ranks, background=True)
    assert recorder.overlaps("learn", "feed"), "the recorder sees no overlap where there is one"
    for name in ("learn", "feed", "control"):
        order = [
            [kind, size]
            for group, kind, size in recorder.order
            if group == name and kind != "all_to_all"
        ]
        assert all(other == order for other in ranks.all_gather_object(order))


def test_all_ranks_call_collectives_in_one_order_and_one_group_at_a_time():
    spawned(2, in_order)


def test_two_groups_overlap_where_one_begins_before_the_other_ends():
    recorder, value = CollectiveRecorder(), torch.zeros(1)
    first = recorder.begun("learn", "all_reduce", value)
    with recorder.during("feed", "all_to_all", value):
        pass
    first.ended = time.perf_counter()
    assert len(recorder.overlaps()) == 1
    with recorder.during("feed", "all_to_all", value):
        assert len(recorder.overlaps()) == 1
    assert Group("feed").name == "feed"
