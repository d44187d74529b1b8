"""The study of anchored guidance: which runs there are, that each runs once, and its arithmetic."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from statistics import mean

import pytest

from benchmarks.run import main as run_bench
from benchmarks.studies import anchored
from benchmarks.studies.anchored import FULL, arms, chosen, left, runs
from benchmarks.studies.anchored_tables import (
    anchored_tables,
    crossing,
    figure,
    interval,
    needed,
    paired,
)
from benchmarks.studies.settings import recipe_of
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.generate.from_recipe import guidance_config


def line(run, accuracy, **changes):
    """A line as ``measure`` writes it, with an accuracy of one's own."""
    return {
        "part": run.part,
        "kind": run.kind,
        "arm": run.arm,
        "size": run.size,
        "samples": run.size,
        "samples_made": run.size,
        "seed": run.fields["seed"],
        "iterations": 1200,
        "validation_accuracy": accuracy,
        "test_accuracy": accuracy,
        "calibration_error": 0.05,
        "shifts": {"blur": accuracy - 0.1, "noise": accuracy - 0.2},
        "flops": run.size * 2e9,
        "training_flops": 1e12,
        "generation_seconds": 10.0,
        "training_seconds": 50.0,
        "fields": json.loads(json.dumps(run.fields)),
        **changes,
    }


def finished(part, lines, design=FULL, accuracy=lambda run: 0.8):
    """``lines`` and those of all runs of a part, also of those that others make known."""
    lines = list(lines)
    while todo := left(part, lines, design):
        lines += [line(run, accuracy(run)) for run in todo]
    return lines


def best_arm(run):
    best = ("omega 0.08", "omega 0.08, CFG 3.5", "omega 0.2, kappa 0.5", "omega 0.2, kappa 2 late")
    return 0.8 + 0.02 * (run.arm in best) + 0.03 * run.arm.endswith("kappa 2 late from 0.25")


def compared_arms(lines):
    return anchored.compared_arms(lines, FULL)


@pytest.fixture(scope="module")
def selected():
    return finished("selection", [], accuracy=best_arm)


def test_every_run_is_a_recipe_whose_rounds_make_its_samples(selected):
    lines = selected
    for part in anchored.GROUPS:
        lines = finished(part, lines)
    ran = [3 * (3 + 2 + 6 + 11 + 1), 6 * (12 + 4 * 6), 3 * 12, 5 * 6]
    assert list(Counter(each["part"] for each in lines).values()) == ran
    for each in lines:
        practice = Recipe.load("fashion", **each["fields"]).practice
        assert practice.maximum_samples == each["size"]
        assert practice.most_samples == each["size"]
        if each["part"] != "patience":
            assert practice.add_at == (250, 350, 450, 550, 650, 750)
            assert practice.rounds_within(each["size"]) == 6
    by_size = {line["size"]: line["fields"] for line in lines}
    shapes = {n: (f["initial_samples"], f["round_samples"]) for n, f in by_size.items()}
    assert shapes == {
        500: (125, 63),
        1000: (250, 125),
        2000: (500, 250),
        4000: (1000, 500),
        8000: (2000, 1000),
    }


def test_the_selection_tries_more_cfg_at_the_best_omega_of_plain_dp(selected):
    plain = [line for line in selected if line["kind"] == "dp"]
    assert arms("cfg", plain[:-1], FULL) == {}  # one run of plain dp is missing
    assert arms("cfg", plain, FULL) == {
        "omega 0.08, CFG 2.5": {"omega": 0.08, "cfg_scale_rounds": [2.5]},
        "omega 0.08, CFG 3.5": {"omega": 0.08, "cfg_scale_rounds": [3.5]},
    }
    assert [chosen(kind, selected, FULL) for kind in anchored.KINDS] == [
        "static",
        "omega 0.08",
        "omega 0.08, CFG 3.5",
        "omega 0.2, kappa 0.5",
        "omega 0.2, kappa 2 late from 0.25",
        anchored.FOUND,
        "prune",
    ]
    last = max(i for i, each in enumerate(selected) if each["kind"] == "anchored")
    assert chosen("anchored", selected[:last] + selected[last + 1 :], FULL) is None
    # by the validation, whatever the held-out images say
    other = [each | {"test_accuracy": 1 - each["test_accuracy"]} for each in selected]
    assert chosen("dp", other, FULL) == "omega 0.08"


def test_the_confirmation_begins_at_the_middle_size_and_has_a_seeds_arms_together(selected):
    order = list(runs("confirmation", selected, FULL))
    first = [(run.size, run.fields["seed"], run.kind) for run in order[:6]]
    assert first == [
        (2000, 3, "static"),
        (2000, 3, "dp"),
        (2000, 3, "cfg"),
        (2000, 3, "anchored"),
        (2000, 3, "late"),
        (2000, 4, "static"),
    ]
    assert [run.kind for run in order].index("prune") == 5 * (12 + 4 * 6)
    assert list(dict.fromkeys(run.size for run in order)) == [2000, 1000, 500, 4000, 8000]
    seeds = {run.fields["seed"] for run in order}
    assert not seeds & {each["fields"]["seed"] for each in selected}
    assert {(run.size, run.shifts) for run in order} == {
        (2000, True),
        *((size, False) for size in (500, 1000, 4000, 8000)),
    }
    # what is not chosen yet does not hold up the others
    plain = [each for each in selected if each["kind"] == "dp"]
    kinds = {run.kind for run in runs("confirmation", plain, FULL)}
    assert kinds == {"static", "dp", "late", "prune"}


def test_a_late_anchor_is_that_of_the_last_steps(selected):
    found = arms("late", selected, FULL)
    assert len(found) == 3 * 3 + 2
    for name, wanted in (
        (anchored.FOUND, [(0.12, 0.0), (0.12, 0.0), (0.12, 1.0), (0.12, 1.0)]),
        ("omega 0.2, kappa 2 late from 0.25", [(0.2, 0.0), (0.2, 2.0), (0.2, 2.0), (0.2, 2.0)]),
        ("omega 0.2, kappa 2 late from 0.75", [(0.2, 0.0), (0.2, 0.0), (0.2, 0.0), (0.2, 2.0)]),
    ):
        guidance = guidance_config(recipe_of(anchored.COMMON | found[name]))
        assert [guidance.at(i, 8) for i in sorted(guidance.steps(8))] == wanted, name
    # where it begins is asked of the best that begins in the middle, when all of these ran
    begun = [each for each in selected if each["arm"] in list(found)[: 3 * 3]]
    assert len(arms("late", begun[:-1], FULL)) == 3 * 3


def test_the_replication_has_seeds_of_its_own_and_the_chosen_late_arm(selected):
    both = {part: list(runs(part, selected, FULL)) for part in ("confirmation", "replication")}
    late = {part: {r.arm for r in each if r.kind == "late"} for part, each in both.items()}
    assert late == {
        "confirmation": {anchored.FOUND},
        "replication": {"omega 0.2, kappa 2 late from 0.25"},
    }
    seeds = {part: {r.fields["seed"] for r in each} for part, each in both.items()}
    assert not seeds["replication"] & (seeds["confirmation"] | {0, 1, 2})
    arms_of = {run.kind: run.arm for run in both["replication"]}
    assert arms_of.keys() == {"dp", "late", "found"}
    assert arms_of["found"] == anchored.FOUND
    # its chosen arm is in its tables, and in no table of the other part
    lines = finished("replication", finished("confirmation", selected))
    text = "\n".join(anchored_tables(lines, compared_arms(lines), {}))
    replication = text.index("Replication: ")
    assert "from 0.25 | 12 |" in text[replication:]
    assert "from 0.25 | 12 |" not in text[text.index("Confirmation: ") : replication]


def test_the_paper_guides_where_a_runs_fields_do_not_say():
    guidance = recipe_of({"seed": 3}).guidance
    assert (guidance.omega, guidance.anchor, guidance.anchor_schedule) == (0.05, 0.0, ())


def test_a_line_is_made_once_and_only_what_is_missing_is_left(selected):
    assert left("selection", selected, FULL) == []
    (again,) = left("selection", selected[:4] + selected[5:], FULL)
    assert json.loads(json.dumps(again.fields)) == selected[4]["fields"]


def test_nothing_is_left_of_what_was_written_and_read(selected, monkeypatch, tmp_path):
    """All runs, those of more CFG too, whatever the fields are made of."""
    monkeypatch.setitem(anchored.COMMON, "omega_rounds", (0.05, 0.1))
    monkeypatch.setattr(anchored, "CFG_SCALES", (2.5, 3))
    lines, results = [], tmp_path / "anchored.jsonl"
    for part in anchored.PARTS:
        for _ in range(2):  # of what the first runs make known: more CFG, where an anchor begins
            new = [
                line(run, best_arm(run)) | {"fields": run.fields} for run in left(part, lines, FULL)
            ]
            with results.open("a") as file:
                file.writelines(json.dumps(each) + "\n" for each in new)
            lines = anchored.read(results)
        assert left(part, lines, FULL) == []
    assert {each["kind"] for each in lines} == set(anchored.KINDS)


def test_a_seed_that_ran_twice_is_one_seed(selected):
    plain = [each for each in selected if each["kind"] == "dp"]
    twice = [*plain[:-1], plain[-2]]  # seed 1 of the last arm twice, seed 2 never
    assert len(twice) == len(plain)
    assert chosen("dp", twice, FULL) is None
    other = plain[0] | {"validation_accuracy": 1.0, "seed": 99}
    assert chosen("dp", [*plain, other, other], FULL) == "omega 0.08"
    short = [each | {"size": 80, "validation_accuracy": 1.0} for each in plain[:3]]
    assert chosen("dp", [*plain, *short], FULL) == "omega 0.08"
    best = {"selection": dict.fromkeys(anchored.KINDS)}
    once, more = (
        "\n".join(anchored_tables(lines, best, {})) for lines in (plain, [plain[0], *plain])
    )
    assert once == more
    assert "| dp, omega 0.05 | 3 |" in more


def test_of_runs_that_share_unguided_samples_one_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = anchored._next(("selection",), [], FULL, [])
    assert [run.fields["seed"] for run in found] == [0, 1, 2]
    assert [run.fields["seed"] for run in anchored._next(("selection",), [], FULL, found[:1])] == [
        1,
        2,
    ]
    kept = anchored.cached(*found[0].made_from)
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    after = anchored._next(("selection",), [], FULL, found[:1])
    assert found[0] not in after
    assert [run.fields["seed"] for run in after].count(0) == 2 + 6 + 9 + 1  # other arms


@pytest.mark.long
def test_a_short_study_resumes_and_repeats_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = {"OMEGAS": (0.08,), "CFG_SCALES": (), "ANCHORS": (0.5,), "ANCHORED_OMEGAS": (0.12,)}
    few |= {"LATE_OMEGAS": (0.12,), "LATE_KAPPAS": (1.0,), "LATE_BEGINS": ()}
    for name, values in few.items():
        monkeypatch.setattr(anchored, name, values)
    results = tmp_path / "anchored.jsonl"
    command = ["--short", "--part", "selection", "--results", str(results)]
    assert anchored.main(command) == 0
    lines = anchored.read(results)
    assert [each["kind"] for each in lines] == ["dp", "anchored", "late", "static"]
    assert [each["samples"] for each in lines] == [80, 80, 80, 80]
    assert [point[0] for point in lines[0]["curve"]] == [8, 11, 15, 18, 21, 25]
    assert lines[0]["births"]["added"]["samples"] == 60
    assert len(list((tmp_path / "runs" / "study").iterdir())) == 1

    # the run without a line is made again, by another worker and with its bits; the other is not
    kept = results.read_text().splitlines(keepends=True)
    results.write_text("".join([kept[0], *kept[2:]]))
    assert anchored.main([*command, "--workers", "2"]) == 0
    *others, again = anchored.read(results)
    assert others == [lines[0], *lines[2:]]
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in lines[1].items() if "seconds" not in k
    }

    capsys.readouterr()
    assert anchored.main(["--short", "--tables", "--results", str(results)]) == 0
    assert "The selection has not chosen yet: cfg." in capsys.readouterr().out


def test_a_worker_that_dies_is_named_with_its_run(monkeypatch, selected):
    monkeypatch.setattr(anchored.sys, "executable", "/bin/false")
    worker = anchored.Worker()
    run = next(runs("confirmation", selected, FULL))
    with pytest.raises((InputError, BrokenPipeError), match=r"its process ended with 1|Broken"):
        worker.measure(run)
    worker.process.wait()


def test_the_interval_is_that_of_students_t():
    values = [1.2, -0.3, 0.8, 2.1, 0.4, 1.0, 0.7]  # t of 6 degrees of freedom: 2.446912
    middle, low, high = interval(values)
    sd = math.sqrt(sum((value - mean(values)) ** 2 for value in values) / 6)
    assert middle == pytest.approx(mean(values))
    assert (high - middle) == pytest.approx(2.446912 * sd / math.sqrt(7), rel=1e-4)
    assert middle - low == pytest.approx(high - middle)
    assert interval([0.5]) == (0.5, -math.inf, math.inf)
    # two values a and b: the half width is 12.7062 |a - b| / 2
    assert interval([0.0, 1.0])[2] - 0.5 == pytest.approx(12.7062 / 2, rel=1e-4)


def test_the_interval_holds_the_mean_in_95_of_100():
    chance = random.Random(0)
    held = 0
    for _ in range(2000):
        _, low, high = interval([chance.gauss(1.0, 2.0) for _ in range(6)])
        held += low <= 1.0 <= high
    assert 0.935 < held / 2000 < 0.965


def test_differences_are_of_the_seeds_that_both_have():
    assert paired({3: 0.9, 4: 0.8, 5: 0.7}, {4: 0.75, 3: 0.8, 9: 0.1}) == pytest.approx([0.1, 0.05])
    assert paired({3: 0.9}, {4: 0.8}) == []


def test_a_crossing_is_interpolated_in_the_logarithm():
    curve = [(1000.0, 0.7), (2000.0, 0.8), (4000.0, 0.85)]
    assert crossing(curve, 0.75) == pytest.approx(1000 * math.sqrt(2))
    assert crossing(curve, 0.8) == pytest.approx(2000)
    assert crossing(curve, 0.69) == 1000.0
    assert crossing(curve, 0.86) == math.inf
    # where noise makes it fall, the first time counts
    assert crossing([(1.0, 0.5), (2.0, 0.7), (4.0, 0.6), (8.0, 0.8)], 0.65) == pytest.approx(
        2**0.75
    )


def test_what_one_needs_has_the_interval_of_its_seeds():
    curve = {x: {s: 0.6 + 0.1 * math.log2(x) for s in range(6)} for x in (1.0, 2.0, 4.0)}
    goal = dict.fromkeys(range(6), 0.75)
    assert needed(goal, curve, draws=50) == pytest.approx([2**1.5] * 3)  # no noise, no width
    goal = {seed: 0.75 + 0.02 * (-1) ** seed for seed in range(6)}
    middle, low, high = needed(goal, curve, draws=500)
    assert middle == pytest.approx(2**1.5)
    # the mean of six signs is within 0.67 in 95 of 100 draws: 0.0133 in accuracy, 0.133 in log2 x
    assert math.log2(low) == pytest.approx(1.5 - 0.133, abs=0.04)
    assert math.log2(high) == pytest.approx(1.5 + 0.133, abs=0.04)
    goal = dict.fromkeys(range(6), 0.9)
    assert needed(goal, curve, draws=20) == (math.inf, math.inf, math.inf)


def test_seeds_that_a_size_lacks_are_left_out_there():
    curve = {1.0: {0: 0.5, 1: 0.5}, 2.0: {0: 0.7, 1: 0.7, 2: 0.7}}
    middle, low, high = needed({0: 0.6, 2: 0.6}, curve, draws=100)
    assert (middle, low, high) == pytest.approx([math.sqrt(2)] * 3)


def test_the_tables_say_what_the_lines_hold(selected):
    """Anchored is 1.9 points above plain dp at every size, and a doubling gives dp one point."""

    def accuracy(run):
        base = 0.70 + 0.01 * math.log2(run.size / 500)
        return base + {"anchored": 0.019, "static": -0.03}.get(run.kind, 0.0)

    lines = finished("patience", finished("confirmation", selected, accuracy=accuracy))
    best = compared_arms(lines)
    text = "\n".join(anchored_tables(lines, best, {"confirmation": [], "patience": ["dp", "dp"]}))
    assert "| dp, omega 0.08 | 3 | 82.00 ± 0.00 | 82.00 ± 0.00 | 4.00 | chosen |" in text
    assert "| 2,000 | anchored - dp | 12 | +1.90 | +1.90 to +1.90 | 12 of 12 |" in text
    assert "| 500 | dp - static | 6 | +3.00 | +3.00 to +3.00 | 6 of 6 |" in text
    assert "| all | anchored - dp | 6 | +1.90 | +1.90 to +1.90 | 6 of 6 |" in text
    assert text.count("| all | anchored - dp |") == 1, "patience has one size"
    assert "differences of the same seeds, in points. Here dp is omega 0.08; " in text
    # 1.9 points are 1.9 doublings, 3.73 times; what 4,000 reach is beyond dp's largest
    for row in (
        "samples: dp for anchored with 2,000 | 73.90 | 2,000 | 7,464 [7,464, 7,464] | 3.73 [3.73, ",
        "samples: dp for anchored with 500 | 71.90 | 500 | 1,866 [1,866, 1,866] | 3.73 [3.73, ",
        "samples: dp for anchored with 4,000 | 74.90 | 4,000 | > 8,000 [> 8,000, > 8,000] | > 2.00",
        "samples: anchored for dp with 8,000 | 74.00 | 8,000 | 2,144 [2,144, 2,144] | 0.27 [0.27, ",
        "FLOPs of generation: dp for anchored with 500 | 71.90 | 1.00 T | 3.73 T [3.73 T, 3.73 T]",
    ):
        assert f"| {row}" in text, row
    # with those of the training: 2 T, and between dp's 3 T at 1,000 and 5 T at 2,000
    assert f"| 2.00 T | {3 * (5 / 3) ** 0.9:.2f} T [" in text
    assert "Not run yet, of what is known of the patience: 2 of dp." in text


def test_the_figure_has_a_line_for_each_source(selected, tmp_path, capsys):
    lines = finished("confirmation", selected)
    results, file = tmp_path / "anchored.jsonl", tmp_path / "anchored.png"
    results.write_text("".join(json.dumps(each) + "\n" for each in lines))
    command = ["anchored", "--results", str(results), "--figure"]
    assert run_bench([*command, str(file)]) == 0
    assert file.stat().st_size > 10_000
    assert not capsys.readouterr().out
    (axes,) = figure(lines, compared_arms(lines)["confirmation"]).axes
    points = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 5]
    assert points[:1] == [[[n, pytest.approx(80)] for n in (500, 1000, 2000, 4000, 8000)]]
    assert {text.get_text() for text in axes.texts} == {
        "static",
        "prune",
        "dp",
        "anchored",
        "anchored late",
    }
    assert run_bench([*command, str(tmp_path / "none" / "a.png")]) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "dpp"},
        {"test_accuracy": None},
        {"shifts": {"blur": "x"}},
        {"seed": [1]},
        {"fields": None},
        {"births": {"added": {"agreed": 0.9}, "rounds": []}},
    ],
)
def test_a_record_of_another_kind_is_named_with_its_line(changes, selected, tmp_path, capsys):
    results = tmp_path / "anchored.jsonl"
    bad = selected[0] | changes
    results.write_text(f"{json.dumps(selected[1])}\n{json.dumps(bad)}\n")
    name = next(iter(changes))
    for options in ([], ["--tables"]):
        assert run_bench(["anchored", "--results", str(results), *options]) == 2
        assert f"{results}, line 2: {name} = " in capsys.readouterr().err
    results.write_text(json.dumps({n: v for n, v in bad.items() if n != name}) + "\n")
    wanted = 0 if name == "births" else 2
    assert run_bench(["anchored", "--results", str(results), "--tables"]) == wanted


def test_an_arm_that_is_chosen_no_more_is_in_no_table(selected):
    (run, *_) = runs("confirmation", selected, FULL)
    stray = line(run, 0.123, kind="dp", arm="omega 0.9")
    tables = anchored_tables([*selected, stray], compared_arms(selected), {})
    assert "12.30" not in "\n".join(tables)
