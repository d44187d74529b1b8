"""Who waits for whom, on a simulated clock: other ranks' progress comes at times that a script
gives.
"""

import random
import threading
import time

import pytest
import torch.distributed as dist

from dpfast.parallel import RankError, Ranks
from dpfast.parallel.heartbeat import AHEAD, Clock, Heartbeat, Presence
from dpfast.practice import stopping
from dpfast.practice.stopping import Stop, StopTogether


class Script(Clock):
    """A clock that stands while this process works; ``at`` a time something happens elsewhere."""

    def __init__(self):
        self.time, self.events = 0.0, []

    def at(self, when, happens):
        self.events.append((when, happens))

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds
        due = [event for event in self.events if event[0] <= self.time]
        self.events = [event for event in self.events if event[0] > self.time]
        for _, happens in sorted(due, key=lambda event: event[0]):
            happens()


def simulated(size, timeout):
    """Rank 0 of ``size`` on a scripted clock, and a function that says what another rank has
    completed by a time.
    """
    clock, store = Script(), dist.HashStore()
    ranks = Ranks(
        size=size,
        heartbeat=Heartbeat(store, 0, size, timeout, clock),
        store=dist.PrefixStore("said", store),
    )

    def beats(rank, *times):
        for count, when in enumerate(times, 1):
            clock.at(when, lambda count=count: store.set(f"beat/{rank}", str(count)))

    def says(rank, value, when):
        clock.at(when, lambda: ranks.store.set(f"1/{rank}", value))

    return ranks, clock, beats, says


@pytest.mark.parametrize("size", [2, 8, 32])
def test_a_rank_may_be_as_slow_as_it_likes_while_it_makes_progress(size):
    ranks, clock, beats, says = simulated(size, timeout=5)
    # a batch every 4 s, and up to ten times the timeout later than rank 0
    for rank in range(1, size):
        last = 20 + 30 * rank / size
        beats(rank, *(4.0 * n for n in range(int(last / 4) + 1)))
        says(rank, str(rank), last)
    assert ranks.all_gather_object(0) == list(range(size))
    assert last <= clock.time < last + 0.1


def test_a_rank_without_progress_is_named_within_the_timeout_and_a_tenth():
    ranks, clock, beats, says = simulated(4, timeout=10)
    beats(1, *range(1, 100))
    beats(2, 1, 2, 3)  # hangs after three batches
    says(3, "0", 2)  # waits as rank 0 does
    with pytest.raises(
        RankError, match=r"^rank 2 of 4 did not answer: dead, or without progress for 10 s"
    ):
        ranks.all_gather_object(0)
    assert 13 <= clock.time < 13 + 10 / 10 + 0.2


def test_all_ranks_without_progress_are_named():
    ranks, clock, beats, _ = simulated(4, timeout=10)
    beats(2, *range(1, 100))
    with pytest.raises(RankError, match=r"^ranks 1, 3 of 4 did not answer"):
        ranks.all_gather_object(0)
    assert 10 <= clock.time < 11.2


def test_who_waits_for_a_slow_rank_is_not_dead_to_a_third():
    """Rank 0 waits for rank 1, which waits for rank 2 in another place: to wait counts as
    progress.
    """
    ranks, clock, _, says = simulated(3, timeout=5)
    other = Heartbeat(ranks.heartbeat.store, 1, 3, 5, clock)
    for n in range(200):
        clock.at(n / 10, other.beat)  # what ``Heartbeat.wait`` does meanwhile
    says(2, "2", 1)
    says(1, "1", 19)
    assert ranks.all_gather_object(0) == [0, 1, 2]
    assert ranks.heartbeat.store.check(["beat/0"]), "rank 0 has waited, too"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no\nsuch thing"), r"^rank 1 of 3 has ended: ValueError: no$"),
        (RankError("rank 2 of 3 did not answer"), r"^rank 2 of 3 did not answer$"),
        (None, r"^rank 1 of 3 has ended$"),
    ],
)
def test_nobody_waits_for_a_rank_that_has_ended(error, words):
    ranks, clock, beats, _ = simulated(3, timeout=600)
    beats(2, *range(100))
    clock.at(3, lambda: Heartbeat(ranks.heartbeat.store, 1, 3).leave(error))
    with pytest.raises(RankError, match=words):
        ranks.all_gather_object(0)
    assert clock.time < 11


def test_a_beat_costs_a_message_now_and_then():
    ranks, clock, _, _ = simulated(2, timeout=600)
    told = []
    ranks.heartbeat.store = type(
        "Store", (), {"set": lambda self, key, value: told.append((clock.time, value))}
    )()
    for _ in range(30):
        ranks.beat()
        clock.sleep(0.25)
    assert told == [(0.0, "1"), (5.0, "21")]
    Ranks().beat()  # a process alone says nothing


def test_a_process_that_was_stopped_is_named_before_nccl_ends_this_one(capsys):
    ranks, clock, _, _ = simulated(3, timeout=100)
    store, left = ranks.heartbeat.store, []
    presence = Presence(ranks.heartbeat, leave=lambda code: left.append((code, clock.time)))
    while clock.time < 300 and not left:
        if clock.time < 20:
            store.set("here/1", str(clock.time))
        elif clock.time == 20:
            Heartbeat(store, 1, 3).leave(None)  # makes samples only, and has nothing to do any more
        if clock.time < 50:
            store.set("here/2", str(clock.time))
        presence.look()
        clock.sleep(1)
    assert left == [(1, pytest.approx(49 + 100 + AHEAD / 2))]
    assert (
        "dpfast: error: rank 2 of 3 did not answer: dead, or without progress for 100 s"
        in capsys.readouterr().err
    )


def steps_of(size, seed, speeds):
    """Threads as ranks, one of which is asked to stop at a random step: that step, the steps of
    each, the keys.
    """
    store, chance, stops = dist.HashStore(), random.Random(seed), [Stop() for _ in range(size)]
    asked = chance.randrange(size), chance.randrange(5, 60)
    found = [0] * size

    def rank(number):
        ranks = Ranks(
            number,
            size,
            heartbeat=Heartbeat(store, number, size, 20),
            store=dist.PrefixStore("said", store),
        )
        together = StopTogether(stops[number], ranks)
        while True:
            if found[number] % 25 == 0:
                together.anew()
            if together.before(found[number]):
                return
            time.sleep(speeds[number] * chance.random())
            found[number] += 1
            if (number, found[number]) == asked:
                stops[number].requested = True

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return asked[1], found, store.num_keys()


@pytest.mark.parametrize("seed", range(3))
def test_all_ranks_stop_before_the_same_step(monkeypatch, seed):
    monkeypatch.setattr(stopping, "ASK", 0.02)
    asked, found, keys = steps_of(3, seed, speeds=(0.002, 0.001, 0.003))
    assert len(set(found)) == 1, found
    assert asked <= found[0] <= asked + 60
    assert keys < 20, "what was said long ago is removed"
