"""Timing the stages: bounded in time and in size, whatever the recipe's batches are."""

import contextlib
import dataclasses
import types

import pytest
import torch

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.hardware.flops import Counts
from dpfast.hardware.peaks import DEVICES
from dpfast.learn.trainer import Trainer
from dpfast.planning import measure as measured
from dpfast.planning.measure import measure

CPU = torch.device("cpu")


class Machine:
    """A clock that calls move: ``start`` seconds once, then ``each`` for a unit of a batch."""

    def __init__(self, start, each):
        self.now, self.start, self.each, self.sizes = 0.0, start, each, []

    def perf_counter(self):
        return self.now

    @contextlib.contextmanager
    def prepared(self, size):
        def call():
            self.sizes.append(size)
            self.now += self.start + size * self.each
            self.start = 0.0

        yield call


@pytest.mark.parametrize("most", [1, 30, 4096])
@pytest.mark.parametrize(("start", "slower"), [(0.0, 1.0), (2.0, 1.0), (0.5, 9.0), (0.0, 0.01)])
def test_a_stage_ends_in_its_time(most, start, slower, monkeypatch):
    peaks = dataclasses.replace(DEVICES["h100"], half=1e12, full=1e12)
    work = Counts(full=1e9)  # a millisecond at the limit, ten expected
    machine = Machine(start, 0.01 * slower)
    monkeypatch.setattr(measured, "time", types.SimpleNamespace(perf_counter=machine.perf_counter))
    clock = measured.StageClock(peaks, 5.0, CPU)
    each = clock.time("training", machine.prepared, work, most=most, dtype="float32")
    # even where it is nine times slower than expected
    assert machine.now <= 5.0 * max(1.0, slower / 2)
    assert max(machine.sizes) <= most
    assert each == pytest.approx(0.01 * slower, rel=0.2)
    assert f"{max(machine.sizes)} at once" in clock.notes[0]
    assert "on cpu in float32" in clock.notes[0]


def test_what_is_too_long_is_said_and_not_begun(monkeypatch):
    machine = Machine(0.0, 1.0)
    clock = measured.StageClock(DEVICES["h100"], 5.0, CPU)
    assert (
        clock.time("guided samples", machine.prepared, Counts(half=1e15), most=32, dtype="bfloat16")
        is None
    )
    assert not machine.sizes
    assert clock.notes == ["guided samples: not timed, 1 may take 10 s on cpu: derived"]


def test_huge_batches_are_timed_in_small_ones(monkeypatch):
    sizes, step = [], Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, *batch: (sizes.append(len(batch[0])), step(self, *batch))[1]
    )
    recipe = Recipe.load(
        "fashion",
        device="cpu",
        learner={"batch_size": 1 << 20},
        generator={"batch_size": 1 << 20},
    )
    timings = measure(recipe, seconds=1.0)
    assert 0 < max(sizes) < 1 << 15
    assert timings.training > 0
    assert all(", of " in note or "not timed" in note for note in timings.notes[:3])


def test_a_published_name_has_no_weights_to_time():
    """Said so, and not that no folder is called so: its plan for a GPU takes the same name."""
    with pytest.raises(InputError, match=r"a published model without weights.*such as 'h100'"):
        measure(Recipe.load("imagenet1k-sd15"))
