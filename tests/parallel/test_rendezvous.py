"""How the processes of one start meet in a store that still holds what an earlier start said."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from dpfast.parallel import RankError
from dpfast.parallel.rendezvous import meet


def start(store, size, failures=()):
    """All ranks of a start, a thread each; ``failures`` by rank, as torchrun counts them on each
    one's node.
    """
    with ThreadPoolExecutor(size) as threads:
        return list(
            threads.map(
                lambda r: meet(store, r, size, 10.0, failures=dict(failures).get(r, 0)), range(size)
            )
        )


def test_every_start_has_a_name_of_its_own_that_all_its_ranks_know():
    store = dist.HashStore()
    starts = [
        start(store, 3),
        start(store, 3, {1: 1}),
        start(store, 2, {0: 1}),
        start(store, 3, {0: 1, 1: 1, 2: 1}),
    ]
    assert all(len(set(ranks)) == 1 for ranks in starts)
    assert len({ranks[0].name for ranks in starts}) == len(starts)
    assert [ranks[0].again for ranks in starts] == [False, True, True, True]


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_early_does_not_take_an_earlier_start_for_its_own(late):
    store = dist.HashStore()
    (before, _) = start(store, 2)
    names = []
    comes = threading.Timer(0.3, lambda: names.append(meet(store, late, 2, 10.0).name))
    comes.start()
    names.append(meet(store, 1 - late, 2, 10.0, failures=1).name)
    comes.join()
    assert len(set(names)) == 1
    assert names[0] != before.name


def test_a_store_that_was_lost_with_its_node_does_not_make_a_restart_the_first_start():
    assert [ranks.again for ranks in start(dist.HashStore(), 2, {1: 1})] == [True, True]


@pytest.mark.parametrize(("here", "size"), [(0, 2), (1, 2), (2, 3)])
def test_who_is_not_there_is_named(here, size):
    with pytest.raises(
        RankError, match=r"did not answer: dead, or without progress for 0.2 s"
    ) as raised:
        meet(dist.HashStore(), here, size, 0.2)
    absent = ", ".join(str(rank) for rank in range(size) if rank != here)
    assert f" {absent} of {size} " in str(raised.value)


def test_a_rank_that_an_earlier_start_had_and_this_one_has_not_is_named():
    store = dist.HashStore()
    start(store, 2)
    for here in (0, 1):
        with pytest.raises(RankError, match=f"rank {1 - here} of 2 did not answer"):
            meet(store, here, 2, 0.2)
    assert len(json.loads(store.get("roster"))) == 2
