"""Checkpoints by time, in the background: when one is due, what the loop waits for, and how late a
kill comes.
"""

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from dpfast.parallel import Ranks, heartbeat
from dpfast.practice import checkpoint
from dpfast.practice.background import CheckpointTimer, HostCopy
from dpfast.practice.callbacks import Callback
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from tests.practice.small import REAL
from tests.practice.test_loop import run, with_


class Clock(heartbeat.Clock):
    """Seconds that pass when they are told to."""

    seconds = 0.0

    def now(self):
        return self.seconds


class Passing(Callback):
    """So many seconds a step; ``at``: what is to happen after which step.

    Samples are on the disk before it goes on: a checkpoint that waits for them is dropped for a
    newer one, which is right where the clock is the true one.
    """

    patient = True
    practice = None  # whose loops it hears; ``go`` says

    def __init__(self, clock, seconds, at=None):
        self.clock, self.seconds, self.at = clock, seconds, at or {}

    def on_start(self, progress):
        self.practice.loop.samples.wait()

    def on_round(self, progress, addition):
        self.practice.loop.samples.wait()

    def on_step(self, progress):
        if self.patient:
            self.practice.loop.checkpointer.writer.wait()  # what takes no time by that clock
        self.clock.seconds += self.seconds
        self.at.get(progress.step, lambda: None)()


class Killed(Exception):
    pass


def die():
    raise Killed


@pytest.fixture
def clock():
    """The clock of all saving."""
    return Clock()


@pytest.fixture
def usual(recipe):
    """One source, and the checkpoints of a true run."""
    return with_(
        recipe,
        "practice",
        sources=("dp",),
        iterations=60,
        checkpoint_minutes=10.0,
        maximum_rounds=1,
    )


def go(recipe, path, callback, *, writer=RunWriter, **options):
    ranks = Ranks(heartbeat=heartbeat.Heartbeat(clock=callback.clock))
    callback.practice = DeliberatePractice(recipe, real=REAL, ranks=ranks)
    with writer(path, recipe, **options) as folder:
        return callback.practice.run(folder, progress=False, callbacks=[callback])


def saved_at(path):
    """The steps of all checkpoints that a run wrote, in order."""
    lines = [json.loads(line) for line in (path / "timings.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "checkpoint"]


@pytest.mark.parametrize(("took", "due"), [(0.1, 10), (2.0, 200), (8.0, 600), (float("inf"), 600)])
def test_saving_takes_one_percent_of_the_seconds_but_ten_minutes_win(took, due):
    clock = Clock()
    timer = CheckpointTimer(0.01, 10, clock.now)
    timer.begun()
    assert not timer.due()
    timer.took(took)
    clock.seconds = due - 0.01
    assert not timer.due()
    clock.seconds = due + 0.01
    assert timer.due()
    clock.seconds = 599.9
    assert not timer.overdue()
    clock.seconds = 600
    assert timer.overdue()
    assert not CheckpointTimer(0.01, 0, clock.now).overdue()


def test_checkpoints_come_by_the_clock_and_around_every_round(usual, tmp_path, clock, monkeypatch):
    """Two minutes a step, five steps to an evaluation: ten minutes are over right at each."""
    go(usual, tmp_path / "often", Passing(clock, 120.0))
    assert sorted(set(saved_at(tmp_path / "often"))) == [*range(0, 61, 5)]
    # a slow disk
    monkeypatch.setattr(CheckpointTimer, "took", lambda timer, _: setattr(timer, "_took", 1e9))
    go(usual, tmp_path / "rarely", Passing(clock, 1.0))
    (added,) = set(saved_at(tmp_path / "rarely")) - {0, 45, 60}
    # the start, after and before a round, the last before the cool-down, the end of training and of
    # the run
    assert saved_at(tmp_path / "rarely") == [0, 0, added, added, 45, 60, 60]


def test_a_run_killed_between_two_evaluations_loses_ten_minutes_and_ends_in_the_same_bits(
    usual, tmp_path, clock
):
    """Five minutes a step, ten steps to an evaluation: the second step after each checkpoint makes
    the next one.
    """
    recipe = with_(usual, "practice", evaluate_every=10)
    (whole,), _ = run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        go(recipe, tmp_path / "run", Passing(clock, 300.0, {25: die}))
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints_dp")
    assert newest.step == 24
    assert float(newest.tensors["losses/sums"].abs().sum()) > 0  # in the middle of an interval
    (resumed,) = go(recipe, tmp_path / "run", Passing(clock, 1.0), resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(value, resumed.learner.state_dict()[name]), name


def test_the_loop_goes_on_while_a_checkpoint_is_written_of_the_moment_that_it_was_asked_for(
    usual, tmp_path, clock
):
    """The disk hangs at iteration 5 until iteration 20; what it then gets are the weights of
    iteration 5.
    """
    room, seen = threading.Event(), {}
    recipe = with_(usual, "practice", maximum_rounds=0, checkpoints_kept=100)

    class HangingDisk(RunWriter):
        def sync(self):  # before a checkpoint is written, in the background
            if watching.practice.loop.trainer.step_count >= 5:
                assert room.wait(60)
            super().sync()

    class Watching(Passing):
        def on_step(self, progress):
            self.patient = progress.step < 5  # for the checkpoints before
            super().on_step(progress)
            loop = self.practice.loop
            if progress.step in (5, 20):
                weights = loop.trainer.model.state_dict()["model.classifier.1.weight"]
                seen[progress.step] = weights.clone()
            if progress.step == 20:
                assert loop.checkpointer.writer.writing
                room.set()

    watching = Watching(clock, 120.0)
    go(recipe, tmp_path / "run", watching, writer=HangingDisk)
    first = next(
        p
        for p in checkpoint.paths(tmp_path / "run" / "checkpoints_dp")
        if checkpoint.load(p).step == 5
    )
    kept = load_file(first.with_suffix(".safetensors"))["trainer/model/model.classifier.1.weight"]
    assert torch.equal(kept, seen[5])
    assert not torch.equal(kept, seen[20])


def test_a_copy_on_the_host_stays_as_it_was_and_its_memory_is_used_again():
    copy, weights = (
        HostCopy(),
        {"w": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), "n": torch.tensor(3)},
    )
    first = copy.take(weights)
    before = {name: value.clone() for name, value in weights.items()}
    for value in weights.values():
        value.add_(1)
    assert all(torch.equal(first[name], before[name]) for name in weights)
    assert all(value.is_contiguous() for value in first.values())
    second = copy.take(weights)
    assert {v.data_ptr() for v in second.values()} == {v.data_ptr() for v in first.values()}
    copy.wait()


@pytest.mark.parametrize("dtype", list(checkpoint.DTYPES), ids=str)
def test_weights_are_written_as_safetensors_reads_them(tmp_path, dtype):
    tensors = {
        "b": torch.arange(12).to(dtype).reshape(3, 4).t(),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    digest = checkpoint.save_weights(tensors, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype
        for name, value in tensors.items()
    )
    assert checkpoint._sha256(tmp_path / "x.safetensors") == digest


def test_files_that_are_no_checkpoints_are_passed_over_and_stay(tmp_path):
    taken = Checkpoint(5, 40, 1, {"trainer": {"step": torch.tensor(5)}})
    for label in (None, "round-02", "stable", None):
        checkpoint.save(tmp_path, taken, keep=2, label=label)
    ours = {f"checkpoint-00000{n}.json" for n in ("0", "1-round-02", "2-stable", "3")}
    for name in ("checkpoint-000009 (copy)", "checkpoint-old", "checkpoint-000009-mine", "notes"):
        shutil.copy(tmp_path / "checkpoint-000003.json", tmp_path / f"{name}.json")
    shutil.copy(tmp_path / "checkpoint-000003.json", tmp_path / "checkpoint-9.json")
    assert {path.name for path in checkpoint.paths(tmp_path)} == ours
    assert checkpoint.latest(tmp_path).path.name == "checkpoint-000003.json"
    assert checkpoint.save(tmp_path, taken, keep=1).name == "checkpoint-000004.json"
    kept = [path.name for path in checkpoint.paths(tmp_path)]
    assert kept == [f"checkpoint-00000{n}.json" for n in ("1-round-02", "2-stable", "4")]
    assert (tmp_path / "checkpoint-000009 (copy).json").exists()
