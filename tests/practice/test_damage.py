"""A run's folder with a damaged file: each command goes on from what is whole, or says in one line
which file cannot be used.
"""

import json
import random
import shutil
from dataclasses import replace

import pytest

from dpfast.cli import run as run_command
from dpfast.cli import sample as sample_command
from dpfast.cli.main import main
from dpfast.practice import checkpoint
from dpfast.practice.run_writer import LostLinesWarning
from dpfast.report import page
from dpfast.textfiles import lines
from tests.practice.test_loop import with_

SEEDS = range(60)
COMMANDS = {
    "report": ["report", "RUN"],
    "export": ["export", "RUN", "--format", "imagefolder", "--out", "OUT"],
    "sample": ["sample", "--learner", "RUN", "--omega", "0.1", "--labels", "0", "--count", "1"],
    "resume": ["run", "fashion", "--quiet", "--resume", "--out", "RUN"],
}
WHOLE = ["", "{}", "[]", "null", "7", '"text"', "[null]", '{"a": 1}', "\x00\x00"]
VALUES = [None, [], {}, 7, -1, 2.5, "text", [None], True, {"a": []}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the run of this module is kept, made by the first test that copies it."""
    return tmp_path_factory.mktemp("damage") / "run"


@pytest.fixture
def damaged(whole, recipe, real_folder, tmp_path, monkeypatch):
    """A copy of a run of two rounds, to be damaged. Commands take its recipe and draw little."""
    short = with_(
        recipe, "practice", sources=("dp",), iterations=20, maximum_samples=45, checkpoints_kept=3
    )
    short = replace(short, validation=str(real_folder))
    for command in (run_command, sample_command):
        monkeypatch.setattr(command, "recipe_of", lambda *_, **__: short)
    monkeypatch.setattr(run_command, "_report", lambda *_: None)
    monkeypatch.setattr(page, "_png", lambda _: b"")
    if not whole.exists():
        assert main(["run", "fashion", "--quiet", "--out", str(whole)]) == 0
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def called(command, folder, capsys):
    """The exit code and the lines on stderr; what a bar of progress draws is none."""
    out = folder.with_name(f"out-{command}")
    places = {"RUN": str(folder), "OUT": str(out)}
    words = [places.get(word, word) for word in COMMANDS[command]]
    capsys.readouterr()
    code = main([*words, "--out", str(out)] if command == "sample" else words)
    return code, [line for line in lines(capsys.readouterr().err) if "sample/s" not in line]


def spots(value, path=()):
    """The places of all values within one that JSON holds."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from spots(inner, (*path, key))


def put(value, path, change):
    """A copy in which ``change`` was made to the table or list that holds the last of ``path``."""
    value = value.copy()
    if len(path) == 1:
        change(value, path[0])
    else:
        value[path[0]] = put(value[path[0]], path[1:], change)
    return value


def broken(text, rng):
    """The text of a JSON file with one damage."""
    how = rng.choice(["whole", "cut", "value", "value", "gone"])
    if how == "whole":
        return rng.choice(WHOLE)
    if how == "cut":
        return text[: rng.randrange(len(text))]
    table, new = json.loads(text), rng.choice(VALUES)
    change = (
        (lambda at, key: at.pop(key)) if how == "gone" else lambda at, key: at.update({key: new})
    )
    found = [path for path in spots(table) if isinstance(path[-1], str)]
    return json.dumps(put(table, rng.choice(found), change))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", SEEDS)
def test_every_damage_ends_in_a_result_or_in_one_line(damaged, seed, capsys):
    rng = random.Random(seed)
    files = [path for path in sorted(damaged.rglob("*.json*")) if path.parent.name != "logs"]
    path = rng.choice(files)
    text = path.read_text()
    if path.suffix == ".jsonl":
        rows = text.splitlines()
        at = rng.randrange(len(rows))
        rows[at] = broken(rows[at], rng)
        path.write_text("\n".join(rows) + "\n")
    else:
        path.write_text(broken(text, rng))
    for command in COMMANDS:
        code, said = called(command, damaged, capsys)
        assert code in (0, 2), (path.name, command, said)
        if code == 2:
            assert len(said) == 1, (path.name, command, said)
            assert said[0].startswith("dpfast: error: ")


def test_a_whole_run_is_taken_by_every_command(damaged, capsys):
    for command in COMMANDS:
        code, said = called(command, damaged, capsys)
        assert code == 0, (command, said)


@pytest.mark.parametrize("name", ["born.json", "recipe.json"])
@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"practice": {"iterations": "many"}}'])
def test_a_recipe_without_what_a_run_goes_on_with_is_named(damaged, name, text, capsys):
    (damaged / name).write_text(text)
    code, (said,) = called("resume", damaged, capsys)
    assert code == 2
    assert str(damaged / name) in said


@pytest.mark.parametrize(
    ("name", "line", "why"),
    [
        (
            "metrics.jsonl",
            '{"event": "evaluation", "source": "dp", "step": 5, "loss": {}}',
            "loss = {}",
        ),
        ("metrics.jsonl", '{"event": "addition", "source": "dp", "step": 5}', "lacks round"),
        ("metrics.jsonl", "[]", "is no table"),
        ("timings.jsonl", "7", "is no table"),
        ("timings.jsonl", '{"event": "interval", "source": null, "step": 5}', "lacks source"),
        ("timings.jsonl", '{"event": "gener', "is cut short"),
    ],
)
def test_a_line_that_no_run_writes_is_left_out_of_the_report_and_named(
    damaged, name, line, why, capsys
):
    path = damaged / name
    path.write_text(path.read_text() + line + "\n")
    count = len(lines(path.read_text()))
    assert called("report", damaged, capsys)[0] == 0
    told = (damaged / "report" / "index.html").read_text()
    assert f"run: line {count} of {name} " in told
    assert f"{why} and was left out" in told.replace("&quot;", '"')


@pytest.mark.parametrize(
    "change",
    [
        {"step": 7},
        {"components": None},
        {"components": {}},
        {"iterations": 19},
        {"version": None},
        {"record_sha256": "0"},
    ],
    ids=str,
)
def test_a_checkpoint_whose_values_were_changed_is_passed_over(damaged, change, capsys):
    newest = checkpoint.paths(damaged / "checkpoints_dp")[-1]
    newest.write_text(json.dumps(json.loads(newest.read_text()) | change))
    with pytest.warns(checkpoint.DamagedCheckpointWarning, match=f"{newest.name} is no intact"):
        assert called("resume", damaged, capsys)[0] == 0


def test_a_checkpoint_of_before_the_checksum_is_read(damaged):
    newest = checkpoint.paths(damaged / "checkpoints_dp")[-1]
    record = json.loads(newest.read_text())
    del record["record_sha256"]
    newest.write_text(json.dumps(record))
    assert checkpoint.latest(newest.parent).path == newest


def test_lines_that_are_gone_are_told_of_and_not_made_of_zeros(damaged, capsys):
    (damaged / "metrics.jsonl").write_text("")
    with pytest.warns(LostLinesWarning, match=r"metrics.jsonl ends before the checkpoint does"):
        assert called("resume", damaged, capsys)[0] == 0
    assert "\x00" not in (damaged / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codec": 7}, "has codec = 7"),
        ({"suffix": None}, "has suffix = None"),
        ({"shape": "wide"}, "has shape = 'wide'"),
        ({"classes": [1]}, "has classes = [1]"),
        ({"shards": 7}, "its shards are no list"),
        ({"shards": [{}]}, "cannot be read"),
    ],
    ids=str,
)
def test_a_manifest_with_other_values_is_named(damaged, change, said, capsys):
    path = damaged / "pool_dp" / "manifest.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | change))
    code, (line,) = called("export", damaged, capsys)
    assert code == 2
    assert str(path) in line
    assert said in line


@pytest.mark.parametrize("ids", [None, 7, [[0]], [["0", "44"]], [[0, 3]]])
def test_a_shard_whose_ids_are_not_its_samples_is_named(damaged, ids, capsys):
    path = damaged / "pool_dp" / "manifest.json"
    table = json.loads(path.read_text())
    table["shards"][0]["ids"] = ids
    path.write_text(json.dumps(table))
    code, (line,) = called("export", damaged, capsys)
    assert code == 2
    assert f"{path}: what it says of 'shard-000000.tar' is damaged" in line
