"""The study: every run once, and tables that say what its lines hold."""

from __future__ import annotations

import json

import pytest

from benchmarks.studies import options as study_options
from benchmarks.studies import study
from benchmarks.studies import tables as study_tables


def test_a_short_study_resumes_and_shares_the_unguided_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "study.jsonl"
    command = ["--short", "--part", "scaling", "--results", str(results)]
    assert study.main(command) == 0
    lines = study_tables.read(results)
    assert [line["source"] for line in lines] == ["dp", "static", "dp", "static"]
    assert [line["samples"] for line in lines[1::2]] == [80, 160]
    assert [line["curve"][-1][1] for line in lines] == [line["samples"] for line in lines]
    static = [line for line in lines if line["source"] == "static"]
    assert static[1]["generation_seconds"] == pytest.approx(2 * static[0]["generation_seconds"])
    assert len(list((tmp_path / "runs" / "study").iterdir())) == 1

    kept = results.read_text().splitlines(keepends=True)
    results.write_text("".join(kept[:3]))
    assert study.main(command) == 0
    again = study_tables.read(results)
    assert again[:3] == lines[:3]
    assert {k: v for k, v in again[3].items() if "seconds" not in k} == {
        k: v for k, v in lines[3].items() if "seconds" not in k
    }


def line(source: str, samples: int, accuracy: float, seed: int = 0, **changes) -> dict:
    fields = {
        **study.COMMON,
        "sources": source,
        "maximum_samples": samples,
        "iterations": 100,
        "seed": seed,
        **changes,
    }
    return {
        "source": source,
        "samples": samples,
        "iterations": fields["iterations"],
        "test_accuracy": accuracy,
        "generation_seconds": samples / 10,
        "training_seconds": 50.0,
        "samples_made": samples,
        "fields": fields,
    }


@pytest.fixture
def results(tmp_path):
    """Static gains a point a doubling; dp with 100 samples is where static is with 400."""
    lines = [
        line("static", n, a, seed)
        for n, a in ((100, 0.7), (200, 0.71), (400, 0.72))
        for seed in (0, 1)
    ]
    lines += [line("dp", 100, 0.71, 0), line("dp", 100, 0.73, 1), line("dp", 200, 0.75)]
    lines += [line("dp", 200, 0.5, omega=0.2), line("dp", 200, 0.71, iterations=50)]
    path = tmp_path / "study.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def test_tables_compare_the_sources_at_equal_settings(results):
    lines = study_tables.read(results)
    grid = study_tables.scaling(lines)
    assert grid["dp", 200].accuracies == (0.75,)  # neither the other omega nor the shorter training
    assert str(grid["dp", 100]) == "72.00 ± 1.41"
    assert study_tables.sweep(lines, "dp", "omega").keys() == {study.COMMON["omega"], 0.2}
    text = "\n".join(study_tables.tables(results))
    assert "Best static accuracy: 72.00 % with 400 samples" in text
    assert "dp: 100, 4.0x fewer." in text


def test_an_option_is_held_against_the_plain_loop_of_its_seed_size_and_flops(results):
    option = study.OPTIONS[0]
    plain = [
        line("dp", n, a) | {"flops": 1e9 * n} for n, a in ((100, 0.7), (200, 0.72), (400, 0.74))
    ]
    tried = line("dp", 200, 0.735, **option) | {"flops": 2e11 * 2**0.5, "nearest": 0.1}
    other = line("dp", 200, 0.735, seed=1, **option) | {
        "flops": 2e11,
        "nearest": 0.1,
    }  # nothing to compare
    (gain,) = study_options.gains([*plain, tried, other])[study_options.text(option)]
    assert (gain.flops, gain.same_size, gain.same_flops) == pytest.approx((2**0.5, 0.015, 0.005))
    (row,) = study_options.rows([*plain, tried, other])
    assert row == [study_options.text(option), "1", "73.50", "1.41x", "+1.50", "+0.50", "0.100"]
    assert study_options.at(5e11, [(1.0, 0.5), (2.0, 0.6)]) is None


def test_seconds_are_those_of_the_least_disturbed_run(results):
    lines = study_tables.read(results)
    slow = {**lines[0], "generation_seconds": 1000.0, "training_seconds": 1000.0}
    assert study_tables.seconds([*lines, slow])(slow) == pytest.approx(100 / 10 + 50.0)
    samples, iterations, omega, cell = study_tables.cheapest(lines, 0.72)["dp"]
    assert (samples, iterations, omega, cell.seconds) == (
        100,
        100,
        study.COMMON["omega"],
        pytest.approx(60.0),
    )
