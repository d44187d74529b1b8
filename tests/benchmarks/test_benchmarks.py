"""The benchmarks: no ratio without correctness, ratios of one interleaved run, records that name
the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import RESULTS, ROOT, run
from benchmarks.cases import bias_residual, gate_norm_modulate, geglu, group_norm, relu_chain
from benchmarks.harness import gate, timing
from benchmarks.harness.registry import COMPILED, EAGER, OURS, OURS_OUT, SUITES, Case, cases
from benchmarks.systems import learner

CPU = torch.device("cpu")


def tiny(tests: str, **changes) -> Case:
    variants = {
        EAGER: lambda: time.sleep(4e-3),
        OURS: lambda: time.sleep(1e-3),
        OURS_OUT: lambda: None,
    }
    options = {"bytes": 1 << 12, "targets": {EAGER: 2, "copy": 0.5}}
    options["build"] = lambda device: dict(variants)
    return Case(operation="sleep", size="4 ms", tests=tests, **options | changes)


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Makes one tiny case the whole suite, gated by a test file with the given body."""

    def replace(body: str) -> None:
        tests = tmp_path / "test_operation.py"
        tests.write_text(f"def test_the_operation():\n    {body}\n")
        monkeypatch.setattr(run, "cases", lambda suite: [tiny(str(tests))])

    return replace


def test_an_operation_that_fails_its_tests_is_not_timed(use, tmp_path, monkeypatch, capsys):
    use("assert 1 == 2, 'the gradient is wrong'")
    monkeypatch.setattr(run, "measure", lambda *arguments: pytest.fail("timed"))
    assert run.main(["ops", "--rounds", "1", "--record", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "the gradient is wrong" in captured.err
    assert "sleep: 4 ms: its tests fail, nothing is timed" in captured.err
    assert "sleep" not in captured.out
    assert (tmp_path / "ops.jsonl").read_text() == ""


def test_the_gate_runs_without_the_interpreter_and_the_slow_tests(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tests = tmp_path / "test_operation.py"
    tests.write_text(
        "import os, pytest\n"
        "def test_environment():\n    assert 'TRITON_INTERPRET' not in os.environ\n"
        "@pytest.mark.slow\ndef test_slow():\n    assert False\n"
    )
    assert gate.failure(str(tests)) is None
    assert "not found" in (gate.failure(str(tmp_path / "test_missing.py")) or "")


def test_a_record_has_the_times_the_ratios_and_the_machine(use, tmp_path, capsys):
    use("pass")
    assert run.main(["ops", "--rounds", "3", "--device", "cpu", "--record", str(tmp_path)]) == 0
    fresh, reused = map(json.loads, (tmp_path / "ops.jsonl").read_text().splitlines())
    assert (fresh["pages"], reused["pages"]) == ("fresh", "reused")
    for record in (fresh, reused):
        assert record["case"] == "sleep: 4 ms"
        assert record["rounds"] == 3
        assert record["bytes"] == 1 << 12
        assert record["targets"] == {EAGER: 2, "copy": 0.5}
        assert set(record["seconds"]) == {EAGER, OURS, OURS_OUT, run.COPY}
        assert {"suite", "when", "cpu", "threads", "torch", "commit"} <= set(record)
        assert all(
            0 < seconds["minimum"] <= seconds["median"] for seconds in record["seconds"].values()
        )
        for ours, ratios in record["ratios"].items():
            assert ratios == {
                rival: record["seconds"][rival]["median"] / record["seconds"][ours]["median"]
                for rival in (EAGER, run.COPY)
            }
    assert "| sleep: 4 ms | fresh | eager |" in capsys.readouterr().out


def test_a_run_that_is_cut_off_has_kept_and_told_the_cases_before(
    use, monkeypatch, tmp_path, capsys
):
    use("pass")
    (one,) = run.cases("ops")
    monkeypatch.setattr(run, "cases", lambda suite: [one, tiny(one.tests, build=None)])
    with pytest.raises(TypeError):  # the second case has nothing to build
        run._run(["ops", "--rounds", "1", "--device", "cpu", "--tested", "--record", str(tmp_path)])
    assert len((tmp_path / "ops.jsonl").read_text().splitlines()) == len(run.KINDS["cpu"])
    assert "| sleep: 4 ms | reused | eager |" in capsys.readouterr().out


def test_without_the_gate_there_are_no_ratios_and_no_record(use, tmp_path, capsys):
    use("assert False")
    assert (
        run.main(
            [
                "ops",
                "--rounds",
                "1",
                "--device",
                "cpu",
                "--no-gate",
                "--record",
                str(tmp_path / "new"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "| sleep: 4 ms | fresh | eager |" in out
    assert "x |" not in out
    assert "% |" not in out
    assert not (tmp_path / "new").exists()


def test_variants_take_turns_and_the_median_counts(monkeypatch):
    called: list[str] = []
    clock = iter([1.0, 1.0, 5.0, 2.0, 3.0, 7.0, 9.0, 4.0])  # two first calls, then A B A B A B
    monkeypatch.setattr(timing, "_once", lambda call, repeats, device: (call(), next(clock))[1])
    times = timing.interleave(
        {name: lambda name=name: called.append(name) for name in "AB"}, 3, CPU
    )
    assert "".join(called) == "AA" + "BB" + "ABABAB"
    assert (times["A"].median, times["A"].minimum) == (5.0, 3.0)
    assert (times["B"].median, times["B"].minimum) == (4.0, 2.0)


def test_short_calls_are_repeated_within_a_measurement():
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    timing.interleave({"A": call}, 2, CPU)
    assert calls > 1000


def test_peak_counts_what_is_held_at_once():
    x = torch.zeros(1000)
    # a result and what makes it
    assert timing.peak_bytes(lambda: (x + 1) * 2 + 3, CPU) == pytest.approx(8000, abs=100)
    assert timing.peak_bytes(lambda: ((x + 1), (x + 2), (x + 3)), CPU) == pytest.approx(
        12000, abs=100
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nosuch"], "suite = 'nosuch': expected one of ops, pool, "),
        (
            ["ops", "--only", "nosuch"],
            "only = 'nosuch': no case of ops has it; there are: entropy_and_grad",
        ),
        (["ops", "--rounds", "0"], "rounds = 0: expected a whole number of at least 1"),
        (["ops", "--rounds", "few"], "rounds = 'few': expected a whole number of at least 1"),
        (["ops", "--device", "cuda:99"], "device = 'cuda:99'"),
        (["theory", "--draws", "1"], "draws = 1: expected a whole number of at least 2"),
        (["study", "--tables", "--seeds", "1,b"], "seeds = '1,b': expected whole numbers"),
        (["models", "--models", "vit"], "models = 'vit': expected dit-xl-2 or"),
        (["ranks", "--only", "nosuch"], "only = 'nosuch': no case; there are"),
        *(
            ([suite, "--nosuch"], f"--nosuch: no such option of dpfast bench {suite}")
            for suite in run.TABLES
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_2(arguments, named, capsys):
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_every_file_of_cases_belongs_to_a_suite():
    files = {path.stem for path in (ROOT / "benchmarks" / "cases").glob("[a-z]*.py")}
    assert sorted(name for names in SUITES.values() for name in names) == sorted(files)


def test_operations_are_measured_without_the_packages_of_other_suites():
    """On a bare machine: torch, Triton, numpy, pytest and nothing else of what dpfast needs."""
    hidden = (
        "import sys; sys.modules.update(dict.fromkeys(('PIL', 'diffusers', 'transformers', "
        "'webdataset')))"
    )
    code = (
        f"{hidden}; from benchmarks.run import main; main(['ops', '--only', '256 x 10', "
        "'--rounds', '1', '--no-gate'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "entropy_and_grad: 256 x 10" in result.stdout, result.stderr


def test_every_operation_has_a_case_and_tests_that_gate_it():
    found = cases("ops")
    assert {case.operation for case in found} == {
        "entropy_and_grad",
        "guided_step",
        "normal",
        "gather_batch",
        "group_norm",
        "bias_residual",
        "geglu",
        "gate_norm_modulate",
        "relu_chain",
    }
    assert all((ROOT / case.tests).is_file() for case in found)


SMALL_CASES = {
    "group_norm": group_norm._case(2, (64, 32), 8, backward=True),
    "bias_residual": bias_residual._case(2, 10, 4),
    "geglu": geglu._case(2, 3, 10, backward=True),
    "gate_norm_modulate": gate_norm_modulate._case(2, 3, 10, backward=True),
    "relu_chain": relu_chain._case(2, 4, 8),
}


@pytest.mark.parametrize("operation", SMALL_CASES)
def test_what_only_a_gpu_computes_otherwise_is_not_timed_on_a_cpu(operation, capsys):
    assert run.main(["ops", "--only", operation, "--device", "cpu"]) == 2
    assert f"only = {operation!r}: no case of ops has it" in capsys.readouterr().err
    # It says itself whether ours and the rival agree.
    assert set(SMALL_CASES[operation].build(CPU)) == {EAGER, COMPILED, OURS}


def recorded(suite):
    return [json.loads(line) for line in (RESULTS / f"{suite}.jsonl").read_text().splitlines()]


def test_the_documented_gpu_rows_of_the_sampler_are_those_of_the_record():
    lines = (ROOT / "docs" / "records" / "results.md").read_text().splitlines()
    records = recorded("models")
    assert {record["model"] for record in records} == {"dit-xl-2", "stable-diffusion-1.5"}
    for record in records:
        rows = [line.split("|")[2:] for line in lines if line.startswith(f"| {record['row']} |")]
        rates = [record["samples_per_second"][kind] for kind in ("guided", "unguided")]
        cost = f"{record['cost']:.2f} ({record['cost_by_flops']:.2f})"
        same = [row for row in rows if row[2].strip() == cost]
        assert any(
            [float(row[0]), float(row[1])] == pytest.approx(rates, rel=5e-3) for row in same
        ), record["row"]


def test_the_documented_rehearsal_is_that_of_the_record_and_within_a_tenth():
    text = (ROOT / "docs" / "records" / "scaling.md").read_text()
    for record in {record["samples"]: record for record in recorded("rehearsal")}.values():
        rehearsed, measured, ratio = (
            max(record["phases"].values()),
            record["measured"],
            record["ratio"],
        )
        sizes = f"{record['samples']}, {record['images']}"
        assert (
            f"| {sizes} | {measured / 1e6:.0f} MB | {rehearsed / 1e6:.0f} MB | {ratio:.3f} |"
            in text
        )
        assert abs(ratio - 1) < 0.1


def test_the_documented_differences_of_bf16_are_those_of_the_record():
    text = (ROOT / "docs" / "records" / "numerics.md").read_text()
    for record in {record["learner"]: record for record in recorded("precision")}.values():
        accuracy, cosine = record["accuracy"], record["cosine"]
        row = (
            f"| {record['learner']} | {accuracy[0]:.2%}, {accuracy[1]:.2%} | "
            f"{record['other_class']:.2%} | "
        )
        row += (
            f"{record['entropy']:.3f}, {record['entropy_difference']:.4f} nats | "
            f"{cosine['median']:.4f}, "
        )
        assert row + f"{cosine['one_percent']:.3f}, {cosine['minimum']:.3f} |" in text


def test_the_documented_steps_of_the_learner_are_those_of_the_record():
    text = (ROOT / "docs" / "records" / "results.md").read_text()
    for record in recorded("learner")[-2:]:
        for row in record["rows"]:
            median, minimum = (
                f"{row['seconds'][kind] * 1e3:.2f}" for kind in ("median", "minimum")
            )
            line = (
                f"| {record['training']}, {record['batch']} images "
                f"| {row['row']} | {median} | {minimum} | "
            )
            assert f"{line}{row['host_waits']} |" in text


def test_a_step_of_the_learner_is_timed_in_turns_with_its_host_waits():
    config = learner.Learner(
        model="transformers:RegNetForImageClassification",
        options={"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "groups_width": 4},
        mixup=0.5,
        clip_grad_norm=1.0,
    )
    training = learner.Training(name="tiny", config=config, classes=3, channels=1, side=8, size=4)
    record = learner.measure(training, CPU, rounds=2, steps=1, wanted="plain loop|dpfast")
    waits = {row["row"]: row["host_waits"] for row in record["rows"]}
    assert waits["plain loop"] > 0, "AdamW reads the step of each weight"
    assert waits["dpfast"] == waits["dpfast, 4 micro-batches"] == 0
    assert "| dpfast, 4 micro-batches | " in learner.table(record)


def test_records_are_appended_with_the_machine_before_them(tmp_path):
    file = tmp_path / "some.jsonl"
    timing.append(file, "some", [{"value": 1}])
    timing.append(file, "some", [{"value": 2, "threads": 7}])
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert list(first)[:4] == ["suite", "when", "cpu", "threads"]
    assert (first["suite"], first["value"], second["value"], second["threads"]) == ("some", 1, 2, 7)


@pytest.mark.parametrize("suite", ["overhead", "plan", "scaling", "theory"])
def test_a_record_that_cannot_be_written_is_named_before_any_work(suite, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "x", "is no folder")):
        assert run.main([suite, "--record", str(path)]) == 2
        told = capsys.readouterr()
        assert told.err.startswith(f"dpfast bench: error: record = {str(path)!r}: ")
        assert said in told.err
        assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_folder_of_records_that_cannot_be_one_is_named_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run.main(["ops", "--record", str(tmp_path / "file")]) == 2
    assert "record = " in (told := capsys.readouterr()).err
    assert told.out == ""
