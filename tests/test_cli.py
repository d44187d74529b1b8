"""The command line: errors in one line with exit code 2, samples on disk, the doctor's report."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from dpfast.cli import main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "nosuch"], "recipe = 'nosuch'"),
        (["run", "fashion", "--omgea", "0.1"], "did you mean --omega?"),
        (["run", "fashion", "--omega", "strong"], "omega = 'strong'"),
        (["run", "fashion", "--initial-samples", "5"], "initial_samples = 5: at least one for each of 10 classes"),
        (["run", "fashion", "--round-samples", "5"], "round_samples = 5"),
        (["run", "fashion", "--pipeline", "/nowhere"], "pipeline = '/nowhere': no such folder"),
        (["run", "fashion", "--classes", "7"], "classes = 7"),
        (["run", "fashion", "--validation", "imagenet"], "validation = 'imagenet'"),
        (["sample", "--labels", "10", "--out", "x"], "labels = '10'"),
        (["sample", "--labels", "Hat", "--out", "x"], "labels = 'Hat'"),
        (["sample", "--labels", "0", "--out", "x", "--count", "0"], "count = 0"),
        (["sample", "--labels", "0", "--out", "x", "--steps", "0"], "steps = 0"),
        (["sample", "--labels", "0", "--out", "x", "--omega", "0.1", "--learner", "/nowhere"], "learner = '/nowhere'"),
        (["sample", "--out", "x"], "--labels"),
        (["dance"], "dance"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dpfast: error: ")
    assert named in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    for extra in ([], ["--overwrite"]):
        assert main(["run", "fashion", "--out", str(tmp_path / "run"), *extra]) == 2
        assert "holds no run" in capsys.readouterr().err
    (tmp_path / "run" / "recipe.json").write_text("{}")
    assert main(["run", "fashion", "--out", str(tmp_path / "run")]) == 2
    assert "--resume continues it, --overwrite replaces it" in capsys.readouterr().err
    assert main(["sample", "--labels", "0", "--out", str(tmp_path / "run")]) == 2
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_sample_writes_images_of_the_classes_asked_for(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["sample", "--labels", "Bag, 1", "--count", "2", "--omega", "0.03", "--out", str(out)]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rows] == ["Bag", "Bag", "Trouser", "Trouser"]
    assert all(0 <= row["entropy"] <= 2.303 for row in rows)
    assert Image.open(out / rows[0]["file"]).size == (32, 32)
    assert (out / "overview.png").is_file()


def test_doctor_names_versions_backends_and_remedies(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for wanted in ("torch", "diffusers", "nvidia-dali-cuda130", "guided_step", "gather"):
        assert wanted in text


def test_a_wrong_argument_is_answered_without_importing_torch():
    code = "import sys; from dpfast.cli import main; main(['run', 'nosuch']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
