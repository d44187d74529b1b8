"""Trackers hear the numbers of a run, know it again, and never hold it up or end it."""

import importlib
import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker

from dpfast.config import Recipe
from dpfast.errors import InputError, RecipeError
from dpfast.practice import trackers
from dpfast.practice.run_paths import RunPaths, unbegun
from dpfast.practice.run_writer import RunWriter
from dpfast.practice.trackers import Tracked, TrackerThread, TrackerWarning, new_trackers

ROOT = Path(__file__).parents[2]


class Kept(GeneralTracker):
    """Keeps what it hears, and fails at one of its calls."""

    name, requires_logging_directory, main_process_only = "kept", False, False

    def __init__(self, fails="", kept=None):
        self.fails, self.tracker = fails, [] if kept is None else kept

    def _hears(self, what, *heard):
        if what == self.fails:
            raise ConnectionError(f"no {what}\nand a page more")
        self.tracker.append((what, *heard))

    def start(self):
        self._hears("start")

    def store_init_configuration(self, values):
        self._hears("configuration", values)

    def log(self, values, step=None, **options):
        self._hears("log", step, values)

    def finish(self):
        self._hears("finish")


def thread(folder, tracker):
    run = Tracked("run", folder, {"omega": 0.3})
    return TrackerThread("kept", run, partial(trackers._started, tracker))


def test_a_tracker_hears_all_in_order_and_the_run_has_one_id_in_all_its_lives(tmp_path):
    kept = Kept()
    for life in range(2):
        each = thread(tmp_path, kept)
        each.begin()
        each.log(5, {"dp/evaluation/lr": 0.1})
        each.log(3 + life, {"dp/checkpoint/seconds": 1.0})
        each.close()
    life = ["start", "configuration", "log", "log", "finish"]
    assert [what for what, *_ in kept.tracker] == life * 2
    assert kept.tracker[1] == ("configuration", {"omega": 0.3})
    assert kept.tracker[3] == ("log", 3, {"dp/checkpoint/seconds": 1.0})
    known = json.loads((tmp_path / "tracking.json").read_text())["id"]
    assert len(known) == 32
    assert Tracked("again", tmp_path, {}).id() == known
    (tmp_path / "tracking.json").write_text("{")  # as a kill leaves it
    assert Tracked("again", tmp_path, {}).id() == Tracked("again", tmp_path, {}).id() != known


@pytest.mark.parametrize("call", ["start", "configuration", "log", "finish"])
def test_a_tracker_that_fails_is_off_with_one_warning_of_one_line(tmp_path, call):
    each = thread(tmp_path, Kept(call))

    def tracked():
        each.begin()
        for step in range(3):
            each.log(step, {"dp/evaluation/lr": 0.1})
            if call != "finish":
                each._thread.join()
        each.close()

    with pytest.warns(TrackerWarning) as caught:
        tracked()
    (said,) = [str(warning.message) for warning in caught]
    assert said.startswith(f"the tracker kept is off: no {call}; the run goes on")


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "LAST", 0.05)
    answer = threading.Event()
    kept = Kept()
    kept.start = answer.wait
    each = thread(tmp_path, kept)
    each.begin()
    each.log(5, {"dp/evaluation/lr": 0.1})
    with pytest.warns(TrackerWarning, match=r"is off: it has not taken all numbers within 0\.05 s"):
        each.close()
    answer.set()
    each._thread.join()


def test_accelerate_makes_no_process_group_under_torchrun(tmp_path):
    """In a process of its own: accelerate asks once for each process."""
    code = (
        "from pathlib import Path; import os, torch\n"
        "from tests.practice.test_trackers import Kept, thread\n"
        f"each = thread(Path({str(tmp_path)!r}), Kept()); each.begin(); each.close()\n"
        "assert os.environ['LOCAL_RANK'] == '0' and each._failure is None\n"
        "assert not torch.distributed.is_initialized()\n"
        "from accelerate import PartialState; assert PartialState().is_main_process\n"
    )
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **launched, **place},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_only_the_first_rank_tracks_and_a_folder_with_trackers_alone_is_no_begun_run(
    recipe, tmp_path
):
    assert RunPaths(tmp_path).watchers(None) == ()
    lines = replace(recipe, trackers=("tests.practice.test_trackers:Kept",))
    with RunWriter(tmp_path / "run", lines) as writer:
        assert not (tmp_path / "run" / "tracking.json").exists()  # as a branch is prepared
        writer.watchers(None)
    assert (tmp_path / "run" / "tracking.json").exists()
    (tmp_path / "run" / "wandb").mkdir()
    assert unbegun(tmp_path / "run")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("json:loads", "Expecting value: line 1"),
        ("json:nothing", "has no attribute 'nothing'"),
        ("json:__name__", "is a str, expected a kind of accelerate.tracking.GeneralTracker"),
        ("nowhere:Tracker", "cannot import nowhere"),
        ("pathlib:PurePosixPath", "gives a PurePosixPath, expected a kind of accelerate"),
    ],
)
def test_a_path_to_no_tracker_is_one_line_and_leaves_no_folder(recipe, tmp_path, path, said):
    with pytest.raises(InputError, match=f"^trackers = '{path}': .*{said}") as caught:
        RunWriter(tmp_path / "run", replace(recipe, trackers=("tensorboard", path)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_no_one_knows_or_that_comes_twice_is_refused():
    with pytest.raises(RecipeError, match=r"^trackers = 'tensorbord': expected a list of "):
        Recipe.load("fashion", trackers="tensorbord")
    with pytest.raises(RecipeError, match=r"^trackers = 'wandb,wandb': expected each once$"):
        Recipe.load("fashion", trackers="wandb,wandb")
    assert Recipe.load("fashion", trackers="").trackers == ()


def lives(recipe, folder, name):
    """Two lives of a run with one of the trackers that are known by name, which warns of nothing
    and takes a smaller step after a larger one.
    """
    folder.mkdir()
    for value in (0.25, 0.5):
        (each,) = new_trackers(replace(recipe, trackers=(name,)), folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the packages say
            warnings.simplefilter("error", TrackerWarning)
            each.begin()
            each.log(10, {"dp/evaluation/lr": value})
            each.log(5, {"static/evaluation/lr": value})
            each.close()
    return json.loads((folder / "tracking.json").read_text())["id"]


def test_weights_and_biases_keeps_one_run_with_its_own_steps(recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    known = lives(recipe, tmp_path / "run", "wandb")
    kept = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(kept) in (1, 2)  # one a life, unless both began within one second
    text = b"".join(each.read_bytes() for each in kept)
    for name in (b"dp/evaluation/lr", b"static/evaluation/lr", b"omega", b"step"):
        assert name in text


def test_mlflow_keeps_one_run_and_its_parameters_as_they_were_born(recipe, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    importlib.import_module("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    known = lives(recipe, tmp_path / "run", "mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.tags["dpfast_run"] == known
    assert run.info.run_name == "run"
    assert run.data.params["omega"] == str(recipe.guidance.omega)
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "static/evaluation/lr")
    assert [(each.step, each.value) for each in history] == [(5, 0.25), (5, 0.5)]


def test_trackio_keeps_one_run(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    lives(recipe, tmp_path / "run", "trackio")
    assert [each.name for each in (tmp_path / "trackio").glob("*.db")] == ["dpfast.db"]
