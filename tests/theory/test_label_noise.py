"""Label noise of selected samples: against drawn ones, its ends, and beside measured cells."""

import itertools
import json
import math

import numpy as np
import pytest

from dpfast.cli.main import main
from dpfast.errors import InputError
from dpfast.report.sweeps import measured_cells, measured_pruning
from dpfast.theory import figures
from dpfast.theory.guided import GuidedCell, beside_theory, label_noise
from dpfast.theory.label_noise import Shares, directions, hardness, kept, matched, shares

UNSELECTED = Shares(label_wrong=0.048, selector_wrong=0.06, useful=0.035)


@pytest.mark.parametrize("power", [0.0, 3.0, 40.0])
@pytest.mark.parametrize("unselected", [UNSELECTED, Shares(0.2, 0.1, 0.02), Shares(0.3, 0.4, 0.35)])
def test_shares_agree_with_drawn_samples(unselected, power):
    at = directions(unselected)
    t, v, z = np.random.default_rng(0).standard_normal((3, 400_000))
    second = (at.rho - at.rho_g * at.rho_s) / math.sqrt(1 - at.rho_g**2)
    third = math.sqrt(max(0.0, 1 - at.rho_s**2 - second**2))
    label = at.rho_g * t + math.sqrt(1 - at.rho_g**2) * v > 0
    truth = at.rho_s * t + second * v + third * z > 0
    weight = np.cosh(t / 2) ** (-2 * power)
    assert kept(power) == pytest.approx(weight.mean(), abs=0.003)
    wrong = label != (t > 0)
    for got, of in zip(
        shares(at, power), (label != truth, wrong, wrong & (label == truth)), strict=True
    ):
        spread = np.sqrt(np.sum(weight**2) / np.sum(weight) ** 2)
        assert got == pytest.approx(np.average(of, weights=weight), abs=2.5 * spread)


def test_without_selection_the_shares_are_those_that_gave_the_directions():
    for given in (UNSELECTED, Shares(0.2, 0.1, 0.02), Shares(0.05, 0.3, 0.26)):
        np.testing.assert_allclose(shares(directions(given)), given, rtol=0, atol=2e-6)


def test_labels_that_are_the_truth_are_never_wrong():
    clean = directions(UNSELECTED).improved(1)
    assert clean.rho == 1
    assert clean.rho_g == pytest.approx(clean.rho_s)
    assert shares(clean, 30.0).label_wrong == pytest.approx(0, abs=1e-5)
    assert directions(UNSELECTED).improved(0) == pytest.approx(directions(UNSELECTED))


def test_hard_samples_have_wrong_labels():
    at = directions(UNSELECTED)
    made = [shares(at, power) for power in (0, 1, 10, 100, 1000)]
    for below, above in itertools.pairwise(made):
        assert below.label_wrong < above.label_wrong < 0.5
        assert below.selector_wrong < above.selector_wrong < 0.5
    power = hardness(at, 0.25)
    assert shares(at, power).selector_wrong == pytest.approx(0.25, abs=1e-5)
    assert hardness(at, 0.01) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("label_wrong", "selector_wrong"), [(0.12, 0.37), (0.3, 0.4), (0.02, 0.2)])
def test_a_match_has_both_shares(label_wrong, selector_wrong):
    at = directions(UNSELECTED)
    power, improvement = matched(at, label_wrong, selector_wrong)
    got = shares(at.improved(improvement), power)
    assert got[:2] == pytest.approx((label_wrong, selector_wrong), abs=1e-4)
    selection = shares(at, hardness(at, selector_wrong)).label_wrong
    assert (improvement > 0) == (label_wrong < selection)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (Shares(1.2, 0.1, 0.0), "label_wrong"),
        (Shares(0.1, math.nan, 0.0), "selector_wrong"),
        (Shares(0.1, 0.3, 0.31), "useful"),
        (Shares(0.1, 0.3, 0.1), "useful"),
        (Shares(0.6, 0.9, 0.5), "useful"),
    ],
)
def test_impossible_shares_are_refused(given, name):
    with pytest.raises(ValueError, match=rf"^{name} = "):
        directions(given)


def line(omega, kappa, agreement, wrong, right_of_wrong, **changes):
    return {
        "omega": omega,
        "kappa": kappa,
        "cfg_scale": 1.5,
        "projected": False,
        "samples": 5000,
        "agreement": [[agreement, 0.01], [0.5, 0.01]],
        "wrong": [wrong, 0.01],
        "right_of_wrong": [[right_of_wrong, 0.01], None, None],
        **changes,
    }


def run(source, seed, accuracy, **fields):
    fields = {"seed": seed, "maximum_samples": 100, "iterations": 10, "add_at": [5], **fields}
    return {"source": source, "samples": 100, "test_accuracy": accuracy, "fields": fields}


@pytest.fixture
def files(tmp_path):
    """Records of three forms at the usual CFG, and of others; and runs of two seeds."""
    guidance, anchored = tmp_path / "guidance.jsonl", tmp_path / "anchored.jsonl"
    cells = [
        line(0.12, 0.5, 0.9, 0.3, 0.7),
        line(0.0, 0.0, 0.95, 0.06, 0.6),
        line(0.12, 0.0, 0.4, 0.3, 0.5, samples=10),
        line(0.12, 0.0, 0.75, 0.4, 0.5),
        line(0.12, 0.0, 0.8, 0.4, 0.5, cfg_scale=2.5),
        line(0.12, 0.0, 0.8, 0.4, 0.5, projected=True),
        line(0.12, 0.5, 0.8, 0.4, 0.5, late=True),
    ]
    runs = [
        run("static", 0, 0.7),
        run("static", 1, 0.75),
        run("dp", 0, 0.72, omega=0.12),
        run("dp", 1, 0.76, omega=0.12, anchor=0.5),
        run("dp", 2, 0.9, omega=0.12, anchor=0.5),
        run("dp", 0, 0.9, omega=0.12, cfg_scale_rounds=[2.5]),
        run("dp", 1, 0.9, omega=0.12, anchor=0.5, anchor_schedule=[[0.0, 0.0], [1.0, 1.0]]),
        run("static", 0, 0.6, maximum_samples=50),  # the other size has more
        run("dp", 0, 0.7, omega=0.12, maximum_samples=50),
    ]
    guidance.write_text("".join(json.dumps(each) + "\n" for each in cells))
    anchored.write_text("".join(json.dumps(each) + "\n" for each in runs))
    return guidance, anchored


def test_cells_are_read_with_the_gains_of_their_runs(files):
    found = measured_cells(*files)
    assert [cell[:2] for cell in found] == [(0, 0), (0.12, 0), (0.12, 0.5)]
    assert found[1][2] == pytest.approx((0.25, 0.4, 0.2))
    assert [cell[3] for cell in found] == [[], pytest.approx([2.0]), pytest.approx([1.0])]
    assert [cell[3] for cell in measured_cells(files[0])] == [[], [], []]


def test_pruning_is_read_where_it_was_measured(files):
    assert measured_pruning(files[0]) == []
    unguided = line(0.0, 0.0, 0.95, 0.06, 0.6, hardest=[{"keep": 0.1, "wrong": 0.3, "denied": 0.2}])
    files[0].write_text(json.dumps(unguided) + "\n")
    assert measured_pruning(files[0]) == [(0.3, 0.2)]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": "5"}, "samples = '5': expected a whole number of at least 1"),
        ({"omega": None}, "omega = None: expected a number"),
        ({"wrong": 0.3}, "wrong = 0.3: expected a share, 0 to 1, and its error"),
        ({"agreement": []}, "agreement = []: expected a list of 1 or more"),
        ({"agreement": [[81.5, 1.0]]}, "agreement = [[81.5, 1.0]]: expected a list of 1 or more"),
        ({"right_of_wrong": None}, "right_of_wrong = None: expected a list"),
        ({"projected": "no"}, "projected = 'no': expected true or false"),
    ],
)
def test_a_cell_of_another_kind_is_named_with_its_line(changes, told, files):
    good = line(0.0, 0.0, 0.95, 0.06, 0.6)
    files[0].write_text(f"{json.dumps(good)}\n{json.dumps(good | changes)}\n")
    with pytest.raises(InputError) as caught:
        measured_cells(*files)
    assert str(caught.value).startswith(f"{files[0]}, line 2: {told}")
    files[0].write_text(json.dumps({n: v for n, v in good.items() if n not in changes}))
    with pytest.raises(InputError, match=f"line 1: has no '{next(iter(changes))}'; expected"):
        measured_cells(files[0])


@pytest.mark.parametrize("hardest", [None, 3, [[0.1, 0.2]], [{"wrong": 0.3}], [{"wrong": "a"}]])
def test_pruning_of_another_kind_is_named_with_its_line(hardest, files):
    files[0].write_text(json.dumps({"hardest": hardest}))
    with pytest.raises(InputError, match=r"jsonl, line 1: hardest = .*: expected a list"):
        measured_pruning(files[0])


def test_a_run_that_no_static_one_can_be_held_against_is_named(files):
    files[1].write_text(json.dumps(run("static", 0, 0.7) | {"fields": {"seed": 0}}))
    with pytest.raises(InputError, match=r"line 1, fields: has no 'maximum_samples'; expected"):
        measured_cells(*files)


def test_better_labels_than_selection_leaves_predict_more(files):
    cells = [GuidedCell(o, k, Shares(*s), g) for o, k, s, g in measured_cells(*files)]
    unguided, paper, anchored = beside = beside_theory(cells)
    assert unguided.accuracy == pytest.approx(unguided.accuracy_of_selection, abs=1e-4)
    assert anchored.cell.found.label_wrong < anchored.label_wrong
    assert anchored.accuracy > anchored.accuracy_of_selection
    assert (paper.accuracy > paper.accuracy_of_selection) == (paper.label_wrong > 0.25)
    assert len(label_noise(beside).axes) == 3
    alone = [made._replace(cell=made.cell._replace(gains=())) for made in beside]
    assert len(label_noise(alone, [(0.3, 0.2)]).axes) == 2
    with pytest.raises(ValueError, match=r"^guidance: no cell with omega = 0"):
        beside_theory(cells[1:])


def test_the_command_prints_each_cell_and_refuses_what_is_no_record(
    files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(figures, "write", lambda out, **_: out.mkdir(exist_ok=True) or [])
    guidance, anchored = map(str, files)
    drawn = ["theory", "figures", "--out", str(tmp_path / "out"), "--draws", "2"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"omega": 0.1}) + "\n")
    for options in (["--anchored", anchored], ["--guidance", str(bad)], ["--guidance", "none"]):
        assert main([*drawn, *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main([*drawn, "--guidance", guidance, "--anchored", anchored]) == 0
    told = capsys.readouterr().out
    assert "omega 0.12, kappa 0.5: learner wrong 30.0%, label wrong 10.0%" in told
    assert (tmp_path / "out" / "label_noise.png").is_file()
