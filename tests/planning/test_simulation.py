"""Simulated schedules against sums that can be done by hand."""

import dataclasses

import pytest

from dpfast.config import Recipe
from dpfast.planning.network import Link
from dpfast.planning.simulation import (
    Job,
    UnitSeconds,
    best_overlap,
    efficiency,
    in_turns,
    job_of,
    side_by_side,
    slowest,
)

JOB = Job(
    initial=40,
    rounds=(40, 40),
    segments=(10, 10, 5),
    batch_size=8,
    generation_batch_size=5,
    evaluated=12,
)
COSTS = UnitSeconds(unguided=1.0, guided=2.0, image=0.5, evaluation=0.25)
FREE = Link(latency=0.0, bandwidth=1e30)


def test_one_rank_does_everything_in_turns():
    alone = in_turns(JOB, COSTS, 1, FREE)
    assert (alone.generation, alone.training, alone.evaluation) == (40 + 2 * 80, 25 * 4.0, 3.0)
    assert alone.seconds == 303.0
    assert efficiency(JOB, COSTS, alone, lambda ranks: FREE) == 1.0


def test_samples_are_dealt_in_whole_batches_and_the_rest_evenly():
    four = in_turns(JOB, COSTS, 4, FREE)
    assert (four.generation, four.training, four.evaluation) == (10 + 2 * 20, 25 * 1.0, 0.75)
    assert efficiency(JOB, COSTS, four, lambda ranks: FREE) == 1.0
    three = in_turns(JOB, COSTS, 3, FREE)  # eight batches: three for the busiest
    assert (three.generation, three.training, three.evaluation) == (15 + 2 * 30, 25 * 1.5, 1.0)
    # half of the ranks have nothing to do
    assert in_turns(JOB, COSTS, 16, FREE).generation == 5 + 2 * 10


def test_a_step_pays_what_does_not_shrink_and_what_the_backward_pass_does_not_hide():
    slow = dataclasses.replace(COSTS, step=1.0, gradients=100.0)
    link = Link(latency=0.5, bandwidth=50.0)  # of two ranks 0.5 + 2 seconds
    assert in_turns(JOB, slow, 2, link).training == pytest.approx(25 * (3.0 / 3 + 2.5))
    assert in_turns(JOB, slow, 1, link).training == 25 * 5.0


def test_ranks_wait_for_the_slowest():
    assert slowest([2.0, 1.0], 1) == 1.5
    assert slowest([1.0, 2.0], 2) == 1.75  # both fast in one case of four
    assert slowest([1.0], 256) == 1.0
    uneven = dataclasses.replace(COSTS, spread=(1.0, 2.0))
    assert in_turns(JOB, uneven, 2, FREE).training == pytest.approx(25 * 2.0 * 1.75)


def test_side_by_side_a_segment_takes_the_longer_of_the_two():
    # one of four makes 40 samples in 80 s; three train ten steps of three images in 15 s
    lazy = side_by_side(JOB, COSTS, 4, 1, FREE)
    assert lazy.overlapped == 2 * 80.0
    # three make 15 samples each in 30 s, one trains ten steps in 40 s; then all train the five last
    # ones in 5 s
    busy = side_by_side(JOB, COSTS, 4, 3, FREE)
    assert (busy.generation, busy.overlapped, busy.training, busy.evaluation) == (
        10.0,
        2 * 40.0,
        5.0,
        0.75,
    )
    even = side_by_side(JOB, COSTS, 4, 2, FREE)
    assert even.overlapped == 2 * 40.0
    assert best_overlap(JOB, COSTS, 4, lambda ranks: FREE).overlapped == 80.0
    for generating in (0, 4):
        with pytest.raises(
            ValueError, match=f"generating = {generating}: expected 1 to 3 of 4 ranks"
        ):
            side_by_side(JOB, COSTS, 4, generating, FREE)


def test_overlap_gains_nothing_where_everything_divides_and_much_where_training_does_not():
    def free(ranks):
        return FREE

    assert best_overlap(JOB, COSTS, 4, free).seconds >= in_turns(JOB, COSTS, 4, FREE).seconds
    # training that no number of ranks makes faster: 10 s a step, and a round takes a rank as long
    # as a segment
    stuck = UnitSeconds(unguided=0.0, guided=2.5, image=0.0, step=10.0)
    assert in_turns(JOB, stuck, 2, FREE).seconds == 2 * 50.0 + 250.0
    assert best_overlap(JOB, stuck, 2, free).seconds == 250.0


def test_a_recipes_rounds_lie_between_its_first_step_and_its_cool_down():
    recipe = Recipe.load("imagenet1k-sd15")
    job = job_of(recipe, 6_500_000)
    assert (job.initial, job.rounds) == (1_300_000, (650_000,) * 8)
    assert job.segments == (20_000,) * 8 + (40_000,)
    cut = job_of(recipe, 1_500_000)
    assert (cut.rounds, cut.segments) == ((200_000,), (160_000, 40_000))
    assert job_of(recipe, 1_300_000).segments == (200_000,)
    with pytest.raises(ValueError, match=r"segments = .*: expected 1, one more than rounds"):
        Job(initial=1, rounds=(), segments=(1, 2), batch_size=1, generation_batch_size=1)
