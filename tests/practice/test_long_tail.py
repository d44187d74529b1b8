"""Runs towards class counts: what a pool holds after every round, on ranks, after a kill."""

import re

import pytest
import torch

from dpfast.errors import InputError, RecipeError
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.loop import Loop
from dpfast.practice.run_writer import RunWriter
from dpfast.sources.unguided import UnguidedSamples
from tests.practice.small import REAL, noise
from tests.practice.test_loop import run, with_
from tests.ranks import spawned

COUNTS = [45, 21, 4]
EVERY = ("dp", "static", "prune", "dynamic")


@pytest.fixture
def tail(recipe, tmp_path):
    (tmp_path / "counts.txt").write_text("dog 21\n0 45\nred bicycle 4\n")
    file = str(tmp_path / "counts.txt")
    return with_(recipe, "practice", class_counts=file, sources=EVERY, oversample=2.5)


def filled(pool):
    """Asserts that every round ends at the target's shares, and the last one at the target."""
    labels, rounds = pool.column("label"), pool.column("round")
    for number in rounds.unique().tolist():
        held = labels[rounds <= number]
        share = torch.tensor(COUNTS) * len(held)
        found = held.bincount(minlength=3)
        assert bool((found >= share // 70).all())
        assert bool((found <= -(-share // 70)).all())
    assert labels.bincount(minlength=3).tolist() == COUNTS


def test_every_source_fills_towards_the_target_and_reaches_it(tail, tmp_path):
    results, metrics = run(tail, tmp_path / "run")
    assert [result.source for result in results] == list(EVERY)
    label = {}
    for result in results:
        filled(result.pool)
        ids, labels = (result.pool.column(name).tolist() for name in ("sample_id", "label"))
        assert len(set(ids)) == 70
        for number, each in zip(ids, labels, strict=True):  # a function of the id, in all pools
            assert label.setdefault(number, each) == each
    assert results[2].pool.column("sample_id").max() >= 70
    static, dynamic = results[1].pool, results[3].pool
    assert torch.equal(static.images(torch.arange(70)), dynamic.images(torch.arange(70)))
    for line in (m for m in metrics if m["event"] == "result"):
        per_class = line["test_per_class"]  # all three have fewer than 100
        assert line["test_medium"] == pytest.approx(sum(per_class[:2]) / 2, abs=1e-6)
        assert line["test_few"] == pytest.approx(per_class[2], abs=1e-6)
        assert (line["medium_classes"], line["few_classes"]) == (2, 1)
        assert "test_many" not in line
    evaluations = [m for m in metrics if m["event"] == "evaluation"]
    assert all({"medium", "few"} <= line.keys() for line in evaluations)


def test_counts_that_are_equal_give_the_bits_of_a_balanced_run(recipe, tmp_path):
    small = with_(recipe, "practice", maximum_samples=60, sources=("dp", "static", "dynamic"))
    (tmp_path / "counts").write_text("0 20\n1 20\n2 20\n")
    plain, _ = run(small, tmp_path / "plain")
    even = with_(small, "practice", class_counts=str(tmp_path / "counts"))
    for one, other in zip(plain, run(even, tmp_path / "even")[0], strict=True):
        rows = torch.arange(60)
        assert torch.equal(one.pool.images(rows), other.pool.images(rows))
        assert torch.equal(one.pool.column("label"), other.pool.column("label"))


def test_a_round_of_prune_keeps_the_hardest_of_each_class(tail, tmp_path):
    """With one candidate for each sample it keeps what dynamic makes."""
    one = with_(tail, "practice", sources=("prune", "dynamic"), oversample=1)
    (prune, dynamic), _ = run(one, tmp_path / "run")
    for name in ("label", "sample_id"):
        assert torch.equal(prune.pool.column(name), dynamic.pool.column(name))


def test_a_killed_run_goes_on_to_the_same_bits(tail, tmp_path, monkeypatch):
    tail = with_(tail, "practice", sources=("prune",))
    (whole,), _ = run(tail, tmp_path / "whole")
    close, left = Loop._close_round, [2]

    def dies(loop, request):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        close(loop, request)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_close_round", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tail, tmp_path / "killed")
    moved = tmp_path / "moved.txt"
    moved.write_text((tmp_path / "counts.txt").read_text())
    tail = with_(tail, "practice", class_counts=str(moved))
    with RunWriter(tmp_path / "killed", tail, resume=True) as folder:
        (again,) = DeliberatePractice(tail, real=REAL).run(folder, progress=False)
    filled(again.pool)
    assert torch.equal(again.pool.images(torch.arange(70)), whole.pool.images(torch.arange(70)))
    assert (tmp_path / "killed/metrics.jsonl").read_text() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_text()


def test_a_run_keeps_the_counts_of_its_birth(tail, recipe, tmp_path):
    with RunWriter(tmp_path / "run", tail):
        pass
    with pytest.raises(RecipeError, match=r"class_counts = '' was '.*counts.txt' .*from its birth"):
        RunWriter(tmp_path / "run", with_(tail, "practice", class_counts=""), resume=True)
    (tmp_path / "counts.txt").write_text("dog 20\n0 45\nred bicycle 5\n")
    with pytest.raises(RecipeError, match=r"^class_counts = .*began with: dog is 20, was 21, and"):
        RunWriter(tmp_path / "run", tail, resume=True)
    plain = with_(tail, "practice", class_counts="")
    with RunWriter(tmp_path / "plain", plain):
        pass
    with pytest.raises(RecipeError, match=r"class_counts = '.*counts.txt' was '' "):
        RunWriter(tmp_path / "plain", tail, resume=True)


def on_ranks(ranks, recipe, out):
    results = DeliberatePractice(recipe, real=noise(60), ranks=ranks).run(progress=False)
    for result in results:
        filled(result.pool)
    columns = [[r.pool.column(name) for name in ("label", "sample_id")] for r in results]
    if ranks.first:  # all have gathered them
        torch.save(columns, out / "columns")


def test_two_ranks_fill_towards_the_target(tail, tmp_path):
    tail = with_(tail, "practice", iterations=60)
    spawned(2, on_ranks, tail, tmp_path)
    alone = DeliberatePractice(tail, real=noise(60)).run(progress=False)
    static, found = EVERY.index("static"), torch.load(tmp_path / "columns")
    for mine, name in zip(found[static], ("label", "sample_id"), strict=True):
        assert torch.equal(mine, alone[static].pool.column(name))


def test_what_does_not_fit_is_said_before_any_work(tail, recipe, tmp_path):
    late = with_(tail, "practice", restart=0.3, initial_samples=5, round_samples=5)
    said = r"^restart = 0.3: .* initial_samples = 5 hold none of 'red bicycle'$"
    with pytest.raises(RecipeError, match=said):
        DeliberatePractice(late, real=REAL)
    (tmp_path / "none.txt").write_text("0 70\n1 0\n")
    wrong = with_(tail, "practice", class_counts=str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match=re.escape("no count of class 2 ('red bicycle')")):
        DeliberatePractice(wrong, real=REAL)
    made = UnguidedSamples(recipe, DeliberatePractice(recipe, real=REAL).pipeline)
    with pytest.raises(InputError, match="unguided: its samples have other labels"):
        DeliberatePractice(tail, real=REAL, unguided=made)
