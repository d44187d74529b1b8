"""``dpfast run``: a run and its branch from the command line."""

import errno
import json
from dataclasses import replace

import pytest

from dpfast.cli import run as command
from dpfast.cli.main import main
from dpfast.errors import SaveWarning
from dpfast.report import page
from tests.practice.conftest import real_folder, recipe  # noqa: F401 - fixtures
from tests.practice.test_loop import with_


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_branch_may_be_longer_and_a_report_that_the_disk_refuses_names_its_command(
    recipe,  # noqa: F811
    real_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    short = with_(
        recipe, "practice", sources=("dp",), keep_rounds=True, iterations=40, maximum_samples=45
    )
    short = replace(short, validation=str(real_folder))
    long = replace(short, practice=replace(short.practice, iterations=60))
    run, branch = tmp_path / "run", tmp_path / "branch"
    monkeypatch.setattr(page, "write_report", full)
    options = ["--branch-at", "0", "--branch-from", str(run)]
    for asked, out, more in ((short, run, ["--quiet"]), (long, branch, options)):
        monkeypatch.setattr(command, "recipe_of", lambda _, asked=asked: asked)
        with pytest.warns(SaveWarning) as caught:
            assert main(["run", "fashion", "--out", str(out), *more]) == 0
        (said,) = {str(warning.message) for warning in caught}
        assert said.startswith("the report is not complete: [Errno 28]")
        assert said.endswith(f"with room 'dpfast report {out}' makes it")
        printed, beside = capsys.readouterr()
        if asked is short:  # quiet: the table alone
            assert beside == ""
            assert printed.startswith("\nsource  samples")
            continue
        assert "\r" not in printed + beside  # no terminal, no bar
        lines = [line for line in printed.splitlines() if " | " in line]
        assert len(lines) >= 2
        assert max(map(len, lines)) <= 80
        told = beside.splitlines()
        assert told[:2] == ["Next, the page of this run:", f"  dpfast report {out}"]
        assert told[-1] == f"  dpfast report {out} {run} --out {tmp_path / 'report'}"
    born, now = (
        json.loads((branch / name).read_text())["learner"]["warmup"]
        for name in ("born.json", "recipe.json")
    )
    assert now == born * 40 / 60


def test_a_branch_of_a_folder_without_a_run_is_refused_in_a_line(tmp_path, capsys):
    trunk = tmp_path / "trunk"
    asked = ["--branch-at", "3", "--branch-from", str(trunk), "--out", str(tmp_path / "out")]
    assert main(["run", "fashion", *asked]) == 2
    assert capsys.readouterr().err == (
        f"dpfast: error: branch_from = {str(trunk)!r}: holds no run\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["report", "RUN"],
        ["run", "fashion", "--resume", "--out", "RUN"],
        ["run", "fashion", "--branch-at", "3", "--branch-from", "RUN", "--out", "OUT"],
        ["sample", "--learner", "RUN", "--omega", "0.1", "--labels", "0", "--out", "OUT"],
    ],
    ids=["report", "resume", "branch", "sample"],
)
def test_a_damaged_recipe_of_a_run_is_refused_in_a_line(tmp_path, capsys, words):
    run = tmp_path / "run"
    run.mkdir()
    (run / "learner_dp.safetensors").touch()
    (run / "recipe.json").write_text('{"seed": 0, "gener')
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"dpfast: error: {run / 'recipe.json'}: cannot be read as JSON")
    assert told.count("\n") == 1
