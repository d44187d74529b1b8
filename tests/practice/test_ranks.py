"""The recipes of ImageNet on several ranks at tiny size, killed and resumed: real processes under
torchrun.

DPFAST_KILLS=20 kills a random rank at a random moment, twenty times.
"""

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from dpfast.pool.reader import open_pool
from tests.practice import launch
from tests.practice.launch import Launched

KILLS = int(os.environ.get("DPFAST_KILLS", "0"))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The options that name the folders of imagenet100-sd15, an undisturbed run of it on two ranks,
    and its seconds.
    """
    root = tmp_path_factory.mktemp("imagenet100")
    options = launch.folders("imagenet100-sd15", root)
    run, started = Launched("imagenet100-sd15", root / "whole", options), time.monotonic()
    run.ended()
    return options, root / "whole", time.monotonic() - started


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_pool(run, other, source="dp"):
    mine, theirs = (open_pool(folder / f"pool_{source}") for folder in (run, other))
    names = [
        name for name in mine.records().dtype.names if name not in ("offset", "length", "entropy")
    ]
    for name in names:
        assert (mine.records()[name] == theirs.records()[name]).all(), name
    return mine, theirs


def same(run, other, source="dp"):
    """The same bits."""
    assert (run / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    mine, theirs = same_pool(run, other, source)
    rows = torch.arange(len(mine))
    assert torch.equal(mine.payload(rows), theirs.payload(rows))
    weights, expected = (
        load_file(folder / f"learner_{source}.safetensors") for folder in (run, other)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_killed_rank_is_started_again_and_the_end_is_the_same(rehearsal, tmp_path):
    options, whole, _ = rehearsal
    run = Launched("imagenet100-sd15", tmp_path / "run", options, restarts=1)
    run.until(3)
    assert run.signal(1)
    run.ended()
    same(tmp_path / "run", whole)


@pytest.mark.long
def test_prune_on_two_ranks_goes_on_after_a_kill_and_the_end_is_the_same(tmp_path):
    recipe = "imagenet100-sd15"
    options = [*launch.folders(recipe, tmp_path), "--sources", "prune", "--oversample", "3"]
    Launched(recipe, tmp_path / "whole", options).ended()
    run = Launched(recipe, tmp_path / "run", options, restarts=1)
    run.until(3, source="prune")
    assert run.signal(1)
    run.ended()
    assert "addition" in {line["event"] for line in lines(tmp_path / "run")}
    same(tmp_path / "run", tmp_path / "whole", source="prune")


def test_one_rank_goes_on_from_two_and_ends_as_one_alone(tmp_path):
    recipe, out = "imagenet1k-dit", tmp_path / "two"
    options = launch.folders(recipe, tmp_path)
    run = Launched(recipe, out, options)
    run.until(8)
    assert run.killed()
    Launched(recipe, out, [*options, "--resume"], ranks=1).ended()
    assert not list(out.glob("pool_dp/rank-*")), "what two ranks had saved is needed no more"
    Launched(recipe, tmp_path / "one", options, ranks=1).ended()
    mine, theirs = same_pool(out, tmp_path / "one")
    assert len(mine) == 3000
    initial, later = torch.arange(1000), torch.arange(1000, 3000)
    assert torch.equal(mine.payload(initial), theirs.payload(initial))
    # guided by weights that differ in their last bits
    assert (mine.payload(later).float() - theirs.payload(later).float()).abs().mean() < 0.5
    for found, expected in zip(lines(out), lines(tmp_path / "one"), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-3)
            assert found[name] == wanted, (found["event"], name)


@pytest.mark.skipif(not KILLS, reason="takes minutes; DPFAST_KILLS=1")
def test_the_embedded_recipe_is_the_same_on_one_two_and_four_ranks(tmp_path):
    fields = {
        "sources": "dp",
        "initial_samples": 250,
        "round_samples": 250,
        "maximum_samples": 750,
        "generator.batch_size": 25,
        "maximum_rounds": 2,
        "iterations": 20,
        "evaluate_every": 5,
    }
    options = [
        text
        for name, value in fields.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    for ranks in (1, 2, 4):
        Launched("fashion", tmp_path / str(ranks), options, ranks=ranks).ended()
    initial, alone = torch.arange(250), lines(tmp_path / "1")
    assert "addition" in {line["event"] for line in alone}
    for ranks in (2, 4):
        mine, theirs = same_pool(tmp_path / str(ranks), tmp_path / "1")  # ids, labels, rounds
        assert torch.equal(mine.payload(initial), theirs.payload(initial))
        for found, expected in zip(lines(tmp_path / str(ranks)), alone, strict=True):
            assert (found["event"], found["step"]) == (expected["event"], expected["step"])
            if expected["event"] == "evaluation":
                # Adam divides by the gradients' own size, rounding included, and new samples follow
                # the learner: a second thread of one rank changes as much as ranks do
                # (docs/records/scaling.md)
                near = 5e-3 if expected["samples"] == 250 else 3e-2
                assert found["loss"] == pytest.approx(expected["loss"], rel=near)


@pytest.mark.skipif(not KILLS, reason="takes minutes; DPFAST_KILLS=20 kills twenty times")
@pytest.mark.parametrize("number", range(KILLS))
def test_a_random_rank_killed_at_a_random_moment_changes_nothing(rehearsal, tmp_path, number):
    options, whole, seconds = rehearsal
    chance = random.Random(number)
    run = Launched("imagenet100-sd15", tmp_path / "run", options, restarts=1)
    time.sleep(chance.uniform(0, seconds))
    run.signal(chance.randrange(2))
    run.ended()
    same(tmp_path / "run", whole)


@pytest.mark.skipif(not KILLS, reason="waits for a time-out; DPFAST_KILLS=1")
@pytest.mark.parametrize(
    ("hung", "more"),
    [(1, []), (0, []), (0, ["--overlap", "1", "--overlap-staleness", "5"])],
    ids=["rank 1", "rank 0", "the only trainer"],
)
def test_a_hung_rank_is_named(rehearsal, tmp_path, hung, more):
    options, _, _ = rehearsal
    options = [*options, "--timeout", "20", "--iterations", "100000", *more]
    run = Launched("imagenet100-sd15", tmp_path / "run", options)
    run.until(1 if more else 3)
    assert run.signal(hung, signal.SIGSTOP)
    # a rank may be asked for once more, and a busy machine is slow
    deadline = time.monotonic() + 20 + 20
    while f"rank {hung} of 2 did not answer" not in run.said and time.monotonic() < deadline:
        time.sleep(0.1)
    run.signal(hung)  # torchrun would wait half a minute for it
    assert (
        f"dpfast: error: rank {hung} of 2 did not answer: dead, or without progress for 20 s"
        in run.ended(1)
    )


@pytest.mark.skipif(not KILLS, reason="takes half a minute; DPFAST_KILLS=1")
@pytest.mark.parametrize("number", [1, 3])
def test_sigterm_to_torchrun_saves_the_state_and_torchrun_says_1(rehearsal, tmp_path, number):
    options, whole, _ = rehearsal
    run = Launched("imagenet100-sd15", tmp_path / "run", options)
    run.until(number)
    run.process.terminate()
    said = run.ended(1)  # torchrun's own code after any signal
    assert "dpfast FAILED" not in said, "a rank did not end with 0"
    assert said.count("stopped; the same command with --resume") == 1
    Launched("imagenet100-sd15", tmp_path / "run", [*options, "--resume"]).ended()
    same(tmp_path / "run", whole)


def test_generation_beside_training_repeats_itself_and_bounds_the_age_of_samples(tmp_path):
    recipe = "imagenet100-sd15"
    options = [
        *launch.folders(recipe, tmp_path),
        "--overlap",
        "1",
        "--overlap-staleness",
        "5",
        "--patience",
        "2",
    ]
    whole = tmp_path / "whole"
    Launched(recipe, whole, options).ended()
    pool = open_pool(whole / "pool_dp")
    assert len(pool) == 320
    added = [line["step"] for line in lines(whole) if line["event"] == "addition"]
    rounds, born = pool.column("round"), pool.column("learner_step")
    ages = [step - born[rounds == number].unique() for number, step in enumerate(added, 1)]
    assert all(len(age) == 1 and 0 <= int(age) <= 5 for age in ages), ages
    assert any(int(age) > 0 for age in ages)  # made beside training, by an older learner
    run = Launched(recipe, tmp_path / "run", options, restarts=1)
    run.until(4)
    assert run.signal(1)
    run.ended()
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("overlap", [pytest.param(0, marks=pytest.mark.long), 1])
def test_two_ranks_add_after_exactly_the_steps_that_are_named(tmp_path, overlap):
    """Between evaluations, too; beside training, of the learner of ``overlap_staleness`` steps
    before: it is published once for each round.
    """
    recipe, named = "imagenet100-sd15", [7, 21]
    options = [*launch.folders(recipe, tmp_path), "--add-at", "7,21"]
    options += ["--overlap", str(overlap), "--overlap-staleness", "5"]
    whole = tmp_path / "whole"
    Launched(recipe, whole, options).ended()
    assert [line["step"] for line in lines(whole) if line["event"] == "addition"] == named
    pool = open_pool(whole / "pool_dp")
    rounds, born = pool.column("round"), pool.column("learner_step")
    ages = [
        [step - each for each in born[rounds == number].unique().tolist()]
        for number, step in enumerate(named, 1)
    ]
    assert ages == ([[5], [5]] if overlap else [[0], [0]])
    if not overlap:
        return  # killed in turns: the tests above
    run = Launched(recipe, tmp_path / "run", options, restarts=1)
    run.until(7)  # the one before the first of the two rounds, which is on its way
    assert run.signal(1)
    run.ended()
    same(tmp_path / "run", whole)
