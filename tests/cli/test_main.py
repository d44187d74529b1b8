"""The command line: errors in one line with exit code 2, samples on disk, the doctor's report."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from dpfast.cli.main import main
from dpfast.ops import audit, dispatch


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "nosuch"], "recipe = 'nosuch'"),
        (["run", "fashion", "--omgea", "0.1"], "did you mean --omega?"),
        (["run", "fashion", "--guide_with", "raw"], "did you mean --guide-with?"),
        (["run", "fashion", "--learner.omega", "1"], "did you mean --omega?"),
        (["run", "fashion", "--batch-size", "8"], "--generator.batch-size or --learner.batch-size"),
        (["run", "fashion", "--omega", "strong"], "omega = 'strong'"),
        (["run", "fashion", "--guidance.omega", "strong"], "omega = 'strong'"),
        (
            ["run", "fashion", "--learner.micro-batch", "auto"],
            "micro_batch = 'auto': expected a whole number of at least 1, or leave it out",
        ),
        (
            ["run", "fashion", "--initial-samples", "5"],
            "initial_samples = 5: expected at least one for each of 10 classes",
        ),
        (["run", "fashion", "--round-samples", "5"], "round_samples = 5"),
        (["run", "fashion", "--pipeline", "/nowhere"], "pipeline = '/nowhere': no such folder"),
        (["run", "fashion", "--classes", "7"], "classes = 7"),
        (["run", "fashion", "--validation", "imagenet"], "validation = 'imagenet'"),
        (["run", "fashion", "--log-level", "loud"], "log_level = 'loud'"),
        (["sample", "--labels", "10", "--out", "x"], "labels = '10'"),
        (["sample", "--labels", "Hat", "--out", "x"], "labels = 'Hat'"),
        (["sample", "--labels", "0", "--out", "x", "--count", "0"], "count = 0"),
        (["sample", "--labels", "0", "--out", "x", "--steps", "0"], "steps = 0"),
        (
            ["sample", "--labels", "0", "--out", "x", "--omega", "0.1", "--learner", "/nowhere"],
            "learner = '/nowhere'",
        ),
        (["sample", "--out", "x"], "dpfast sample needs --labels; dpfast sample --help"),
        (["sample", "--labels", "0", "--out", "x", "--count", "2.5"], "count = '2.5': expected a"),
        (["run"], "dpfast run needs RECIPE"),
        (["run", "fashion", "--omega"], "--omega: expected a value"),
        (["run", "fashion", "--steps", "1.5"], "steps = '1.5': expected a whole number"),
        (["run", "fashion", "--timeout", "nan"], "timeout = 'nan': expected a finite number"),
        (["run", "fashion", "--branch-at", "last"], "branch_at = 'last': expected a whole number"),
        (["run", "fashion", "--resume=yes"], "--resume: takes no value, got 'yes'"),
        (["run", "fashion", "--resume", "--overwrite"], "--overwrite: not allowed with --resume"),
        (["run", "fashion", "twice"], "twice: no such argument of dpfast run"),
        (["export", "x", "--format", "zip", "--out", "y"], "format = 'zip': expected one of web"),
        (["bench"], "dpfast bench needs SUITE"),
        (["audit", "--capability", "70"], "capability = 70: expected one of 80, 90, 100"),
        (["audit", "--json", "nowhere/audit.jsonl"], "json = 'nowhere/audit.jsonl'"),
        (["dance"], "command = 'dance': expected one of doctor, init"),
        (["sampel"], "did you mean sample?"),
        (["theory", "figure"], "did you mean figures?"),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(
    arguments, named, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dpfast: error: ")
    assert named in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_warning_is_one_line_of_words(tmp_path):
    """Also one whose place is not in the package; others keep theirs."""
    ours = "warnings.warn('no room', SaveWarning); warnings.warn('old'); return 0"
    code = (
        "import sys, warnings\nfrom dpfast.cli import main\nfrom dpfast.pool.saver import "
        "SaveWarning\n"
        f"def handler(arguments):\n    {ours}\nmain.doctor.doctor = "
        "handler\nsys.exit(main.main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    lines = done.stderr.splitlines()
    assert lines[0] == "dpfast: warning: no room"
    assert "UserWarning: old" in lines[1]


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


def test_a_dry_run_ends_with_the_refusal_of_the_run(tmp_path, monkeypatch, capsys):
    """A pool of mapped files, on a disk without room for it."""
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9 - 10**6, free=10**6)
    )
    command = [
        "run",
        "fashion",
        "--mapped",
        "true",
        "--host-gib",
        "0",
        "--out",
        str(tmp_path / "run"),
        "--quiet",
    ]
    said = []
    for options in (["--dry-run"], []):
        assert main([*command, *options, "--device", "cpu"]) == 2
        out, error = capsys.readouterr()
        assert out == ""
        said.append(error)
    assert said[0] == said[1]
    assert "the pool needs" in said[0]
    assert said[0].count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "rehearse"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--count", "7"], "batch_size = 512: expected a multiple of 14, twice the 7 ranks"),
        (
            ["--count", "2", "--initial-samples", "1000", "--generator.batch-size", "1000"],
            "fewer batches than the 2 ranks",
        ),
    ],
)
def test_a_count_of_devices_is_refused_as_the_run_refuses_it(command, options, named, capsys):
    assert (
        main(
            [
                command,
                "imagenet100-sd15",
                "--device",
                "h100",
                "--learner.batch-size",
                "512",
                *options,
            ]
        )
        == 2
    )
    assert named in capsys.readouterr().err


def test_sample_writes_images_of_the_classes_asked_for(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "sample",
        "--labels",
        "Bag, 1",
        "--count",
        "2",
        "--omega",
        "0.03",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["class"] for row in rows] == ["Bag", "Bag", "Trouser", "Trouser"]
    assert all(0 <= row["entropy"] <= 2.303 for row in rows)
    assert Image.open(out / rows[0]["file"]).size == (32, 32)
    assert (out / "overview.png").is_file()


def test_plan_prints_phases_schedules_memory_and_places(capsys):
    assert (
        main(["plan", "fashion", "--device", "H200", "--count", "2", "--utilisation", "0.3"]) == 0
    )
    text = capsys.readouterr().out
    for wanted in (
        "fashion on 2 x H200",
        "dp: guided samples",
        "of the limit",
        "limited by",
        "dp, simulated in turns",
        "1 of 2 make samples while the others train",
        "guided samples, 250 at once",
        "2000 in device",
    ):
        assert wanted in text
    assert main(["plan", "fashion", "--device", "tpu"]) == 2
    assert (
        "device = 'tpu': expected one of a100, h100, h200, b200, rtx4090, or 'here'"
        in capsys.readouterr().err
    )


def test_doctor_names_versions_backends_and_remedies(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for wanted in ("torch", "diffusers", "nvidia-dali-cuda130", "guided_step", "gather"):
        assert wanted in text


@pytest.mark.skipif(audit.missing() is not None, reason=str(audit.missing()))
def test_audit_prints_and_writes_its_reports_and_fails_on_a_broken_promise(
    tmp_path, monkeypatch, capsys
):
    (good,) = (variant for variant in audit.variants() if variant.name == "normal")
    arguments = ["audit", "--capability", "90", "--json", str(tmp_path / "audit.jsonl")]
    monkeypatch.setattr(audit, "variants", lambda: [good])
    assert main(arguments) == 0
    assert "| normal | sm_90 |" in capsys.readouterr().out
    monkeypatch.setattr(audit, "variants", lambda: [good, replace(good, writes=good.writes // 2)])
    assert main(arguments) == 1
    assert "1 of 2 kernels keep their promises" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [bool(row["problems"]) for row in rows] == [False, True]
    assert {row["capability"] for row in rows} == {90}


def test_audit_needs_the_tools_of_the_linux_wheel(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert main(["audit"]) == 2
    assert capsys.readouterr().err.startswith("dpfast: error: the audit needs the compiler")


TALKS = """
import sys
from dpfast.cli import main

main.doctor.doctor = lambda arguments: print(*range(LINES), sep="\\n", file=FILE) or 0
sys.exit(main.main(["doctor"]))
"""


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("file", ["sys.stdout", "sys.stderr"])
def test_a_reader_that_leaves_ends_a_command_without_a_word(lines, file, tmp_path):
    """As ``dpfast ... | head`` does, with what is printed at once and with what waits in a
    buffer.
    """
    left, ours = os.pipe()
    os.close(left)
    code = TALKS.replace("LINES", str(lines)).replace("FILE", file)
    with (tmp_path / "other").open("wb") as other, os.fdopen(ours, "wb") as pipe:
        streams = {"stdout": pipe, "stderr": other}
        if file == "sys.stderr":
            streams = {"stdout": other, "stderr": pipe}
        done = subprocess.run([sys.executable, "-c", code], **streams)
    assert (done.returncode, (tmp_path / "other").read_bytes()) == (1, b"")


def test_a_command_without_a_stdout_ends_as_it_would():
    command = " ".join([sys.executable, "-c", shlex.quote(TALKS), ">&-"])
    command = command.replace("LINES", "3").replace("FILE", "None")
    assert subprocess.run(command, shell=True, stderr=subprocess.PIPE).stderr == b""


def test_a_pipe_of_others_that_breaks_is_an_error(monkeypatch):
    def breaks(arguments):
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr("dpfast.cli.main._main", breaks)
    with pytest.raises(BrokenPipeError, match="a worker is gone"):
        main(["doctor"])
