"""What a run that goes on may have other than it was born with, and that it then is the run that it
should be.
"""

import contextlib
import dataclasses
import json
import queue
import re
import shutil
import threading

import pytest
import torch

from dpfast.config import fields, short_name
from dpfast.errors import InputError, RecipeError
from dpfast.logs import logged
from dpfast.parallel import Ranks
from dpfast.practice import checkpoint, run_paths
from dpfast.practice.callbacks import Callback
from dpfast.practice.changes import RULES, continued
from dpfast.practice.contents import UnknownContentsWarning
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from dpfast.practice.stopping import Stop, Stopped
from tests.practice.small import REAL
from tests.practice.test_loop import run, with_


class At(Callback):
    """Asks for a stop after a step."""

    def __init__(self, stop, step):
        self.stop, self.step = stop, step

    def on_step(self, progress):
        self.stop.requested = self.stop.requested or progress.step == self.step


@pytest.fixture
def short(recipe):
    return with_(recipe, "practice", sources=("dp",), iterations=40, maximum_samples=45)


def resumed(recipe, path):
    with RunWriter(path, recipe, resume=True) as folder, logged(path):
        return DeliberatePractice(folder.recipe, real=REAL).run(folder, progress=False)


def test_every_field_of_a_recipe_says_whether_it_may_change_and_why():
    """A new field fails here until dpfast/practice/changes.py says what a resumed run may do with
    it.
    """
    assert RULES.keys() == set(map(short_name, fields()))
    assert all(kind in ("free", "branch", "fixed") and why for kind, why in RULES.values())


def test_a_stopped_run_goes_on_with_less_memory_and_ends_in_the_same_samples(short, tmp_path):
    (whole,), _ = run(short, tmp_path / "whole")
    stop = Stop()
    with RunWriter(tmp_path / "run", short) as folder, pytest.raises(Stopped):
        DeliberatePractice(short, real=REAL).run(
            folder, progress=False, callbacks=[At(stop, 12)], stop=stop
        )
    less = with_(with_(short, "generator", batch_size=7), "practice", checkpoints_kept=5)
    less = with_(less, "pool", host_gib=0.5)
    (again,) = resumed(less, tmp_path / "run")
    assert (again.pool.records()["sample_id"] == whole.pool.records()["sample_id"]).all()
    difference = (
        again.pool.images(torch.arange(45)).float() - whole.pool.images(torch.arange(45)).float()
    )
    assert float(difference.abs().mean()) < 0.5  # batches of seven round otherwise
    (line,) = (
        json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    )
    assert line["steps"] == {"dp": 12}
    assert line["changes"] == {
        "checkpoints_kept": [2, 5],
        "host_gib": [None, 0.5],
        "generator.micro_batch": [None, 7],
    }
    told = (tmp_path / "run" / "logs" / "rank-00000.jsonl").read_text()
    for name, (was, value) in line["changes"].items():
        assert told.count(f"from here on {name} = {value!r}, it was {was!r}") == 1
    now = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (now["generator"]["batch_size"], now["generator"]["micro_batch"]) == (20, 7)
    assert json.loads((tmp_path / "run" / "born.json").read_text())["pool"]["host_gib"] is None


@pytest.mark.parametrize("stopped", [20, None], ids=["before its cool-down", "at its end"])
def test_a_run_that_is_made_longer_is_the_long_run_from_its_birth(short, tmp_path, stopped):
    """Fewer additions than there would be in the long run: the cool-down of the short one begins at
    32.
    """
    stop, long = Stop(), with_(short, "practice", iterations=80)
    ends = pytest.raises(Stopped) if stopped else contextlib.nullcontext()
    with RunWriter(tmp_path / "run", short) as folder, ends:
        DeliberatePractice(short, real=REAL).run(
            folder, progress=False, callbacks=[At(stop, stopped)], stop=stop
        )
    (again,) = resumed(long, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["learner"]["warmup"] == 0.05
    (whole,), _ = run(with_(long, "learner", warmup=0.05), tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(value, again.learner.state_dict()[name]), name
    with pytest.raises(RecipeError, match=r"iterations = 40 was 80 \(they may grow"):
        resumed(short, tmp_path / "run")


def test_the_other_sources_of_a_longer_run_begin_anew(recipe, tmp_path):
    short = with_(recipe, "practice", iterations=40, maximum_samples=45)
    run(short, tmp_path / "run")
    long = with_(short, "practice", iterations=60)
    dp, static = resumed(long, tmp_path / "run")
    assert (dp.iterations, static.iterations, len(static.pool)) == (60, 60, len(dp.pool))
    run(with_(long, "learner", warmup=0.1 * 40 / 60), tmp_path / "whole")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_text()


def test_without_a_checkpoint_before_the_cooldown_a_run_is_not_made_longer(short, tmp_path):
    run(short, tmp_path / "run")
    kept = checkpoint.stable(tmp_path / "run" / "checkpoints_dp")
    assert checkpoint.load(kept).step == 30
    kept.unlink()
    with pytest.raises(
        RecipeError, match="iterations = 80 was 40: the run has begun its cool-down"
    ):
        resumed(with_(short, "practice", iterations=80), tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        (
            "generator",
            {"dtype": "bfloat16"},
            r"dtype = 'bfloat16' was 'float32' \(it makes the samples",
        ),
        ("learner", {"batch_size": 16}, r"batch_size = 16 was 8 \(.*micro_batch takes less memory"),
        (
            "pool",
            {"save_samples": "npy"},
            r"save_samples = 'npy' was 'png' \(a saved pool has files of one kind",
        ),
        (
            "practice",
            {"maximum_samples": 70},
            r"maximum_samples = 70 was 45 \(a run that has reached it",
        ),
    ],
)
def test_what_may_not_change_is_named_with_the_reason(short, tmp_path, section, changes, named):
    with RunWriter(tmp_path / "run", short):
        pass
    with pytest.raises(InputError, match=named):
        RunWriter(tmp_path / "run", with_(short, section, **changes), resume=True)
    halved = dataclasses.replace(short, held_out="elsewhere")
    with pytest.raises(RecipeError, match=r"held_out = 'elsewhere' was '' .*without one half"):
        continued(tmp_path / "run", halved)


def test_a_schedule_of_no_anchor_may_change(short, tmp_path):
    late = ((0.499, 0.0), (0.5, 1.0))
    with RunWriter(tmp_path / "run", short):
        pass
    continued(tmp_path / "run", with_(short, "guidance", anchor_schedule=late))
    anchored = with_(short, "guidance", anchor=1.0, anchor_schedule=late)
    with pytest.raises(RecipeError, match=r"anchor = 1.0 was 0.0 .*anchor_schedule = .* was \[\]"):
        continued(tmp_path / "run", anchored)


def images(folder, counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").touch()
    return str(folder)


def test_a_folder_may_move_but_holds_what_it_held(short, tmp_path):
    """Names and sizes are compared, so the images here are empty files."""
    first = images(tmp_path / "real", {"cat": 3, "dog": 2})
    born = dataclasses.replace(short, validation=first, held_out=first)
    generator = shutil.copytree(born.generator.pipeline, tmp_path / "generator")
    moved = with_(born, "generator", pipeline=str(generator))
    with RunWriter(tmp_path / "run", born):
        pass
    assert continued(tmp_path / "run", moved).generator.pipeline == str(generator)
    with (generator / "model_index.json").open("a") as file:
        file.write(" ")
    with pytest.raises(
        RecipeError, match=r"^pipeline = .*began with: model_index.json is \w{16}, was \w{16}$"
    ):
        continued(tmp_path / "run", moved)
    with next(generator.rglob("*.safetensors")).open("ab") as file:
        file.write(b" ")
    with pytest.raises(RecipeError, match=r"^pipeline = .*, and 1 more differ$"):
        continued(tmp_path / "run", moved)
    other = images(tmp_path / "other", {"cat": 3, "dog": 1})
    for field in ("validation", "held_out"):
        with pytest.raises(RecipeError, match=rf"^{field} = .*began with: dog is 1, was 2$"):
            continued(tmp_path / "run", dataclasses.replace(born, **{field: other}))
    (tmp_path / "run" / "contents.json").unlink()
    with pytest.warns(UnknownContentsWarning, match="is up to you"):
        continued(tmp_path / "run", dataclasses.replace(born, validation=other))


def test_a_run_in_progress_is_neither_resumed_nor_replaced(short, tmp_path):
    with RunWriter(tmp_path / "run", short):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"process \d+ on \S+ writes"):
                RunWriter(tmp_path / "run", short, **options)
    with RunWriter(tmp_path / "run", short, overwrite=True):
        pass


class Two(Ranks):
    """One of two threads that hear each other."""

    def all_gather_object(self, value):
        for line in self.store:
            line.put((self.rank, value))
        return [
            said
            for _, said in sorted(
                (self.store[self.rank].get(timeout=20) for _ in range(2)), key=lambda s: s[0]
            )
        ]


def looked(folders):
    """What two ranks find that take these for the folder of one run."""
    lines, found = (queue.Queue(), queue.Queue()), {}

    def look(rank):
        folders[rank].mkdir(exist_ok=True)
        try:
            found[rank] = run_paths.check_shared(folders[rank], Two(rank=rank, size=2, store=lines))
        except InputError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=look, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_a_rank_that_does_not_see_the_folder_of_the_first_is_named_on_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run_paths, "SEEN", 0.3)
    assert looked([tmp_path / "a", tmp_path / "a"]) == {0: None, 1: None}
    for error in looked([tmp_path / "a", tmp_path / "b"]).values():
        assert re.match(
            r"rank 1: out = .*/b': on \S+ it is not the folder in which rank 0 writes", error
        )
