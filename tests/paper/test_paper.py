"""``dpfast paper``: what it prints, makes, goes on with, compares and refuses; a script stands in
for ``dpfast``.
"""

import html
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpfast.cli.main import main
from dpfast.paper.definition import load_table
from dpfast.paper.making import make_others
from dpfast.paper.page import comparison, write_page
from dpfast.paper.runs import Folders, PaperRun, paper_runs
from dpfast.pool.owner import Owner

# writes what a run writes, as the command says; a run whose name is in FAILS stops half-way, once
SCRIPT = """
import json, pathlib, sys
words = sys.argv[1:]
after = lambda name: words[words.index(name) + 1]
out, log = pathlib.Path(after("--out")), pathlib.Path(after("--out")).parent.parent / "calls"
with log.open("a") as file:
    file.write(json.dumps(words) + "\\n")
out.mkdir(exist_ok=True)
source = after("--sources") if "--sources" in words else "dp"
(out / "recipe.json").write_text("{}")
(out / "timings.jsonl").write_text("")
line = {"event": "evaluation", "source": source, "step": 120, "accuracy": 0.5}
if out.name in (pathlib.Path(log.parent / "fails").read_text().split()) and "--resume" not in words:
    (out / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
    print("dpfast: error: the disk is full")
    sys.exit(1)
rounds = int(after("--branch-at")) if "--branch-at" in words else 3
size = int(after("--initial-samples")) + (rounds * 250 if source == "dp" else 0)
line = {"event": "result", "source": source, "step": 300, "samples": size, "additions": rounds,
        "validation_accuracy": 0.6 + size / 1e4, "test_accuracy": 0.6}
(out / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
(out / "index.html").write_text("")
"""

# writes two pictures, and when it is first called stops after the first
PICTURES = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "a.png").write_bytes(b"a")
once = out.parent / "once"
if not once.exists():
    once.write_text("")
    sys.exit(1)
(out / "b.png").write_bytes(b"b")
"""


@pytest.fixture
def small(tmp_path):
    """Calls of ``dpfast paper table4 --small``; ``calls()`` are those of runs."""
    script, out = tmp_path / "fake.py", tmp_path / "out"
    script.write_text(SCRIPT)
    (tmp_path / "fails").write_text("")

    def call(*options, table="table4"):
        launch = shlex.join([sys.executable, str(script)])
        return main(["paper", table, "--small", "--out", str(out), "--launch", launch, *options])

    def calls():
        path = tmp_path / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    call.out, call.calls, call.fails = out, calls, tmp_path / "fails"
    return call


def test_runs_are_made_in_order_and_not_again_and_what_was_killed_goes_on(small, capsys):
    small.fails.write_text("static-130k-seed0")
    assert small("--seeds", "0") == 1
    told = capsys.readouterr().out
    assert "static-130k-seed0: dpfast: error: the disk is full" in told
    made = [Path(words[words.index("--out") + 1]).name for words in small.calls()]
    assert made[:2] == ["static-64k-seed0", "dp-32k-seed0"]
    before = len(made)
    assert small("--seeds", "0") == 0
    assert "static-130k-seed0: goes on" in capsys.readouterr().out
    again = small.calls()[before:]
    assert "--resume" in again[0]
    made += [Path(words[words.index("--out") + 1]).name for words in again]
    assert sorted({*made}) == sorted(
        f"{e.name}-seed0" for e in load_table("table4", small=True).runs
    )
    assert len(made) == len({*made}) + 1  # the one that failed
    assert small("--seeds", "0") == 0
    assert len(small.calls()) == len(made)


def test_a_row_without_a_run_shows_as_missing_beside_the_papers_number(small):
    small.fails.write_text("static-130k-seed0")
    assert small("--seeds", "0") == 1
    table = load_table("table4", small=True)
    runs = paper_runs(table, small.out, (0,), Folders(given={}, pipelines={}))
    lines = {line.entry.name: line for line in comparison(table, runs, "validation")}
    assert list(lines) == [entry.name for entry in table.entries]
    assert lines["dp-32k"].mean == pytest.approx(70)
    assert lines["dp-32k"].difference == pytest.approx(70 - 64.40)
    assert lines["static-130k"].why == "missing: at iteration 120"
    assert (lines["static-260k"].why, lines["static-260k"].mean) == ("missing", None)
    assert lines["static-260k"].paper == 60.02
    assert table.measures == ("validation",)  # no such sets in small
    sketch = {line.entry.name: line for line in comparison(table, runs, "imagenet-sketch")}
    assert "imagenet-sketch was not measured" in sketch["dp-32k"].why
    text = (small.out / "index.html").read_text()
    assert "dp-32k-at-3" in text
    assert "60.02" in text
    assert "static-260k" in text


def test_means_are_of_the_seeds_that_are_there(small):
    small.fails.write_text("static-64k-seed1")
    assert small("--seeds", "0,1") == 1
    table = load_table("table4", small=True)
    runs = paper_runs(table, small.out, (0, 1), Folders(given={}, pipelines={}))
    line = {each.entry.name: each for each in comparison(table, runs, "validation")}["static-64k"]
    assert len(line.measured) == 1
    assert line.why == "seed 1: missing: at iteration 120"


@pytest.mark.parametrize(("name", "printed"), [("table4", True), ("figure5", False)])
def test_what_the_paper_shows_in_a_plot_alone_has_no_columns_of_its_numbers(
    name, printed, tmp_path
):
    table = load_table(name, small=True)
    folders = Folders(given={}, pipelines={})
    page = write_page(table, paper_runs(table, tmp_path, [0], folders), tmp_path).read_text()
    heads = {html.unescape(text) for text in re.findall(r"<th [^>]*>([^<]*)", page)}
    assert {"measured", "gain"} <= heads
    assert heads & {"paper", "difference", "paper's gain"} == (
        {"paper", "difference", "paper's gain"} if printed else set()
    )


def test_a_branch_of_a_run_with_fewer_rounds_is_passed_over_and_says_so(small):
    assert small("--seeds", "0") == 0
    metrics = small.out / "dp-32k-seed0" / "metrics.jsonl"
    line = json.loads(metrics.read_text()) | {"additions": 1}
    metrics.write_text(json.dumps(line) + "\n")
    (small.out / "dp-32k-at-5-seed0" / "index.html").unlink()
    (small.out / "dp-32k-at-5-seed0" / "metrics.jsonl").unlink()
    count = len(small.calls())
    assert small("--seeds", "0") == 0
    assert len(small.calls()) == count
    assert "dp-32k-seed0 ended after 1 of 2 additions" in (small.out / "index.html").read_text()


def test_half_a_branch_is_made_anew_and_a_whole_one_goes_on(tmp_path):
    table = load_table("table4", small=True)
    runs = paper_runs(table, tmp_path, (0,), Folders(given={}, pipelines={}))
    branch = next(run for run in runs if run.entry.branch)
    trunk = next(run for run in runs if run.folder == branch.trunk)
    assert branch.going_on == trunk.going_on == ()
    for run in (branch, trunk):
        (run.folder / "checkpoints_dp").mkdir(parents=True)
        (run.folder / "recipe.json").write_text("{}")
    assert branch.going_on == ("--overwrite",)
    assert trunk.going_on == ("--resume",)
    (branch.folder / "checkpoints_dp" / "checkpoint-000000060-round-01.json").write_text("{}")
    assert branch.going_on == ("--resume",)


def refused(capsys, *words):
    assert main(["paper", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_folder_of_another_table_and_of_other_things_is_refused(small, capsys, tmp_path):
    assert small("--page") == 0
    assert small(table="table5") == 2
    assert "holds the runs of table4 in small, not of table5 in small" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    error = refused(capsys, "table4", "--small", "--page", "--out", str(tmp_path / "mine"))
    assert "holds other things" in error
    folder = Folders(given={}, pipelines={})
    assert isinstance(paper_runs(load_table("table4"), small.out, (0,), folder)[0], PaperRun)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"iterations": 200}, "iterations = 300 was 200"),
        ({"omega": 0.1}, "omega = 0.05 was 0.1"),
        ({"recipe": "mine"}, "recipe = 'fashion' was 'mine'"),
    ],
)
def test_a_definition_that_changed_since_is_refused(small, capsys, change, said):
    assert small("--page") == 0
    path = small.out / "paper.json"
    held = json.loads(path.read_text())
    held["runs"]["static-64k"] |= change
    path.write_text(json.dumps(held))
    assert small() == 2
    error = capsys.readouterr().err
    assert f"its runs were defined otherwise: static-64k, {said}" in error
    assert small.calls() == []


@pytest.mark.parametrize("text", ["[]", "{", '{"runs": 3}', '{"runs": {"static-64k": 3}}'])
def test_a_folder_whose_definition_is_damaged_is_refused(small, capsys, text):
    small.out.mkdir()
    (small.out / "paper.json").write_text(text)
    assert small("--page") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "paper.json" in error


def test_one_command_at_a_time_makes_the_runs_of_a_folder(small, capsys):
    assert small("--page", "--seeds", "0") == 0
    capsys.readouterr()
    owner = Owner(small.out)
    try:
        assert small("--seeds", "0") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"process {os.getpid()}" in error
        assert small.calls() == []
        assert small("--page", "--seeds", "0") == 0  # a look at it
    finally:
        owner.close()


def test_a_folder_that_cannot_be_written_is_named(capsys):
    error = refused(capsys, "table4", "--small", "--page", "--out", "/proc/none/table4")
    assert error.startswith("dpfast: error: out = '/proc/none/table4': cannot be written: ")


def test_pictures_of_another_command_are_whole_or_missing_and_on_the_page(tmp_path):
    """A command that is stopped between two pictures is called again, in an empty folder."""
    script = tmp_path / "pictures.py"
    script.write_text(PICTURES)
    table = load_table("figure3")
    launch, said = [sys.executable, str(script)], []

    def call():
        return make_others(table.commands, tmp_path / "out", "", 0, launch, said.append)

    assert call() == 1
    assert "missing" in write_page(table, [], tmp_path / "out").read_text()
    assert call() == 0
    made = tmp_path / "out" / "theory"
    assert sorted(path.name for path in made.iterdir()) == ["a.png", "b.png"]
    page = write_page(table, [], tmp_path / "out").read_text()
    assert page.count("<img ") == 2
    assert call() == 0
    assert said[-1] == "theory: finished"


def test_a_file_is_no_folder_of_a_table(small, capsys):
    small.out.write_text("")
    assert small("--page") == 2
    assert "expected a folder" in capsys.readouterr().err


def test_further_seeds_may_come_later(small):
    assert small("--page", "--seeds", "0") == 0
    assert small("--page", "--seeds", "0,5") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tabel4"], "did you mean table4?"),
        (["table4"], "needs folders of yours, say --pipeline FOLDER --validation FOLDER"),
        (["table1"], "--real FOLDER"),
        (
            ["table2"],
            "--pipeline stable-diffusion-1.4=FOLDER --pipeline stable-diffusion-1.5=FOLDER",
        ),
        (["table2", "--pipeline", "."], "table2 compares generators"),
        (["table2", "--pipeline", "ldm=/nowhere"], "pipeline = 'ldm=/nowhere': no such folder"),
        (["table4", "--pipeline", ".", "--pipeline", "."], "given twice"),
        (["table4", "--pipeline", "/nowhere"], "pipeline = '/nowhere': no such folder"),
        (["table4", "--validation", "/nowhere"], "validation = '/nowhere': no such folder"),
        (["table4", "--held-out", "/nowhere"], "held-out = '/nowhere': no such folder"),
        (["table4", "--real", "/nowhere"], "real = '/nowhere': no such folder"),
        (["table4", "--small", "--seeds", "0,0"], "seeds = '0,0'"),
        (["table4", "--small", "--seeds", "-1"], "seeds = '-1'"),
        (["table4", "--small", "--seeds", "9999999999"], "seed = 9999999999"),
        (["table4", "--small", "--seeds", ""], "seeds = ''"),
        (["table4", "--small", "--launch", "'"], "launch = "),
        (["table4", "--small", "--launch", ""], "launch = ''"),
        (["table2", "--small"], "table2 has no runs in small"),
        (["table4", "--count", "0"], "count = 0: expected"),
        (["table4", "--dry-run", "--page"], "not allowed with"),
        (["table4", "--dry-run", "--device", "tpu"], "device = 'tpu'"),
    ],
)
def test_bad_input_ends_in_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_without_a_table_they_are_listed(capsys):
    assert main(["paper"]) == 0
    told = capsys.readouterr().out
    for name in ("table1", "table2", "table3", "table4", "table5", "figure1", "figure2", "figure4"):
        assert f"\n{name} " in f"\n{told}"
    assert "(the runs of table4)" in told


def planned(recipe, device, *, count, timings, samples):
    """A plan at a sample a second and no more."""
    practice = recipe.practice
    total = practice.most_samples if samples is None else samples
    static = practice.sources == ("static",)
    first = total if static else practice.initial_samples
    phases = [("unguided samples", first), ("guided samples", total - first), ("training", 3600)]
    return SimpleNamespace(
        phases=[SimpleNamespace(name=n, units=u, seconds=float(u)) for n, u in phases],
        disk=SimpleNamespace(total=2.0**30),
    )


def test_a_dry_run_prints_each_command_with_its_price_and_what_is_lacking(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("dpfast.paper.cost.plan", planned)
    (tmp_path / "val").mkdir()
    out = str(tmp_path / "out")
    validation = ["--validation", str(tmp_path / "val")]
    assert main(["paper", "figure9", "--dry-run", "--out", out, *validation]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith("dpfast run ")]
    assert len(commands) == len(load_table("figure9").runs)
    assert all(f"--validation {tmp_path / 'val'}" in line for line in commands)
    assert all("--pipeline FOLDER-OF-stable-diffusion-1.5" in line for line in commands)
    assert "# needs folders of yours: --pipeline FOLDER" in lines
    branch = next(line for line in lines if line.startswith("# dynamic-130k-at-1-seed0"))
    assert "makes 0 samples, at most 1.0 hours, 1 GiB" in branch  # it trains
    larger = next(line for line in lines if line.startswith("# static-400k-seed0"))
    assert "makes 140,000 samples, 39.9 hours" in larger  # beyond those of static-260k, and trains
    total = next(line for line in lines if " runs: " in line)
    assert "1,690,000 samples" in total  # 780,000 of rounds, and 910,000 static ones once
    assert not (tmp_path / "out").exists()
