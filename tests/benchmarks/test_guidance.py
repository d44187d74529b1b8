"""``dpfast bench guidance``: every cell once, and tables that say what its lines hold."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import run
from benchmarks.systems import guidance, guidance_tables
from benchmarks.systems.guidance import Cell
from dpfast.errors import InputError
from dpfast.generate.guidance import label_score


def test_a_short_bench_resumes_with_the_same_learner(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results, command = tmp_path / "cells.jsonl", ["guidance", "--short", "--count", "40"]
    command += ["--results", str(results)]
    assert run.main(command) == 0
    lines = guidance.finished(results)
    assert [line["cell"] for line in lines] == [cell.name for cell in guidance.SHORT]
    assert "judges agree" in capsys.readouterr().err
    for line in lines:
        assert line["samples"] == 40
        assert 0 < line["entropy"][0] < 2.31
        assert len(line["agreement"]) == 2
        assert line["seconds"] > 0
        assert ("cosine" in line) == (line["omega"] > 0)
    assert lines[1]["entropy"] > lines[0]["entropy"], "guidance makes samples harder"
    assert lines[1]["entropy"] != lines[2]["entropy"], "the projection moves otherwise"
    assert lines[1]["cosine"] != lines[2]["cosine"]

    kept = results.read_text().splitlines(keepends=True)
    results.write_text("".join(kept[:3]))
    assert run.main(command) == 0
    again = guidance.finished(results)
    assert again[:3] == lines[:3]
    vary = ("when", "seconds")
    assert {k: v for k, v in again[3].items() if k not in vary} == {
        k: v for k, v in lines[3].items() if k not in vary
    }
    assert run.main([*command, "--count", "20", "--rows", "projected"]) == 0
    assert [line["samples"] for line in guidance.finished(results)] == [40] * 4 + [20]

    drawn = ["guidance", "--tables", "--figure", str(tmp_path / "curves.png")]
    assert run.main([*drawn, "--results", str(results)]) == 0
    assert "| projected | 0.12 |" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert run.main([*command, "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_the_cells_are_those_that_the_question_needs():
    cells = list(guidance.cells())
    assert len(cells) == len({cell.name for cell in cells})
    strengths = {0.03, 0.05, 0.08, 0.12, 0.2}
    curves: dict[str, set[float]] = {}
    for cell in cells:
        curves.setdefault(cell.form, set()).add(cell.omega)
    assert curves.pop("projected") == strengths
    for kappa in (1, 2):
        assert curves.pop(f"CFG 1.5, kappa {kappa} late") == strengths
    for kappa in (0.25, 0.5, 1, 2):
        assert curves.pop(f"CFG 1.5, kappa {kappa:g}") == strengths
    for scale in (1.5, 2, 2.5, 3.5):
        assert curves.pop(f"CFG {scale:g}, kappa 0") == strengths | {0.0}
    assert not curves


def test_the_projection_takes_away_what_lies_against_the_score_and_nothing_else():
    torch.manual_seed(0)
    gradient, score = torch.randn(2, 40, 4, 3, 3, dtype=torch.float64)
    score[0] = 0
    got = guidance.without_part_against(gradient, score)
    for i in range(len(gradient)):
        g, c = gradient[i].flatten().tolist(), score[i].flatten().tolist()
        along = sum(a * b for a, b in zip(g, c, strict=True))
        squares = sum(b * b for b in c)
        factor = along / squares if squares > 0 and along < 0 else 0.0
        wanted = [a - factor * b for a, b in zip(g, c, strict=True)]
        assert got[i].flatten().tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        assert sum(a * b for a, b in zip(wanted, c, strict=True)) >= -1e-9
    agreeing = (gradient * score).flatten(1).sum(1) >= 0
    assert 0 < agreeing.sum() < len(gradient)
    assert torch.equal(got[agreeing], gradient[agreeing])


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "sample"])
def test_the_label_score_is_that_of_two_known_densities(prediction):
    """x0 is N(m, 1) with the label and N(0, 1) without: score(x | y) - score(x) = alpha m / s^2,
    s^2 = alpha^2 + sigma^2 being the variance of x.
    """
    alpha, sigma = (0.3, 0.7) if prediction == "flow" else (0.6, 0.8)
    mean, x = torch.tensor([1.5, -0.5, 2.0]).double(), torch.randn(2, 3).double()

    def predicted(mean):
        variance = alpha**2 + sigma**2
        x0 = mean + alpha / variance * (x - alpha * mean)  # the posterior's mean
        eps = (x - alpha * x0) / sigma
        known = {"epsilon": eps, "sample": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}
        return known[prediction]

    score = label_score(predicted(mean), predicted(0 * mean), prediction)
    assert guidance.cosine(score, mean.expand(2, 3)) == pytest.approx(1.0, abs=1e-6)


def test_the_cosine_of_tiny_gradients_is_theirs():
    a = torch.tensor([[3e-20, 4e-20], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 2.0], [1.0, 1.0], [-5.0, 0.0]], dtype=torch.float64)
    assert guidance.cosine(a, b).tolist() == pytest.approx([0.8, 0.0, -1.0])


def line(cell: Cell, entropy: float, agreement: float, **changes) -> dict:
    return {
        "cell": cell.name,
        "form": cell.form,
        "omega": cell.omega,
        "kappa": cell.kappa,
        "cfg_scale": cell.cfg_scale,
        "projected": cell.projected,
        "samples": 100,
        "learner": "0123",
        "entropy": [entropy, 0.01],
        "agreement": [[agreement, 0.004], [agreement - 0.1, 0.004]],
        "alike": [0.95, 0.002],
        "wrong": [0.3, 0.01],
        "right_of_wrong": [[0.2, 0.02], [0.1, 0.02], None],
        "useful": [1 - agreement, 0.003],
        "seconds": 12.34,
        "cosine": [-0.2, 0.001],
        "cosine_negative": [0.8, 0.002],
        **changes,
    }


@pytest.fixture
def results(tmp_path):
    lines = [line(Cell(0.12), 0.5, 0.7), line(Cell(0.0), 0.1, 0.9), line(Cell(0.05), 0.3, 0.8)]
    lines += [line(Cell(0.12, kappa=0.5), 0.5, 0.86), line(Cell(0.12, projected=True), 0.3, 0.88)]
    lines += [line(Cell(0.05, cfg_scale=2.5), 0.15, 0.9), line(Cell(0.12), 0.9, 0.1, samples=50)]
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def test_curves_start_where_nothing_is_guided_and_rise_with_omega(results):
    forms = guidance_tables.latest(guidance.finished(results), results)
    assert {form: [each["omega"] for each in own] for form, own in forms.items()} == {
        "CFG 1.5, kappa 0": [0, 0.05, 0.12],  # the cell of 50 samples gives way to that of 100
        "CFG 1.5, kappa 0.5": [0, 0.12],
        "CFG 2.5, kappa 0": [0.05],  # its own start is not there
        "projected": [0, 0.12],
    }
    assert list(forms)[-1] == "projected"
    assert forms["CFG 1.5, kappa 0"][-1]["entropy"][0] == 0.5


def test_forms_are_compared_where_their_entropies_are_equal(results):
    forms = guidance_tables.latest(guidance.finished(results), results)
    paper, anchored = forms["CFG 1.5, kappa 0"], forms["CFG 1.5, kappa 0.5"]
    value, error = guidance_tables.at_entropy(paper, 0.4, "agreement")
    assert value == pytest.approx(0.75)
    # half of each neighbour's 0.004, and half of each one's 0.01 nats at half a point a hundredth
    assert error == pytest.approx((2 * 0.002**2 + 2 * (0.005 * 0.5) ** 2) ** 0.5)
    assert guidance_tables.at_entropy(anchored, 0.4, "agreement", 1)[0] == pytest.approx(0.77)
    assert guidance_tables.at_entropy(paper, 0.6, "agreement") is None
    text = "\n".join(guidance_tables.tables(forms))
    assert "| CFG 1.5, kappa 0 | 0.05 | 0.300 ± 0.010 | 80.0 ± 0.4 | 70.0 ± 0.4 |" in text
    assert "75.0 ± 0.5 / 65.0 ± 0.5" in text
    assert text.count("| 0.100 ± 0.010 |") == 1, "the common start is told once"
    assert "| projected | 0.12 | -0.200 ± 0.001 | 80.0 ± 0.2 |" in text
    assert len(guidance_tables.figure(forms).axes) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rows", "kappa 7"], "rows = 'kappa 7': no row has it; there are: CFG 1.5, kappa 0, "),
        (["--count", "1"], "count = 1: expected a whole number of at least 2"),
        (["nowhere"], "learner = 'nowhere': not the folder of a finished run"),
        (["--omega", "0.1"], "--omega: no such option"),
        (["--tables", "--results", "."], "results = '.': is a folder, expected a file"),
        (["--results", "."], "results = '.': is a folder, expected a file"),
        (["--figure", "nosuch/dir/x.png"], "figure = 'nosuch/dir/x.png': no folder 'nosuch/dir'"),
        (["--figure", "x.xyz"], "figure = 'x.xyz': expected a name that ends in ."),
        (["--figure", "."], "figure = '.': is a folder, expected a file"),
        (["--sheet", "x.xyz"], "sheet = 'x.xyz': expected a name that ends in "),
        (["--tables", "--results", "none.jsonl"], "results = 'none.jsonl': no lines; expected"),
    ],
)
def test_arguments_that_cannot_work_are_told_in_one_line(
    arguments, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run.main(["guidance", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cells_of_several_learners_are_not_one_table(results, capsys):
    other = json.dumps(line(Cell(0.2), 0.6, 0.6, learner="4567"))
    results.write_text(results.read_text() + other + "\n")
    assert run.main(["guidance", "--tables", "--results", str(results)]) == 2
    assert "cells of 2 learners; expected cells of one learner" in capsys.readouterr().err


def test_no_cell_is_measured_beside_those_of_another_learner(results):
    lines = guidance.finished(results)
    (named,) = {line["learner"] for line in lines}
    guidance.check_learner(named, lines, results)
    guidance.check_learner("4567", [], results)
    with pytest.raises(InputError, match=rf"has cells of the learner {named}, and 4567 would"):
        guidance.check_learner("4567", lines, results)


@pytest.mark.parametrize(
    "name",
    [n for n in line(Cell(0.1), 0.5, 0.7) if not n.startswith("cosine")],
)
@pytest.mark.parametrize("options", [["--tables"], ["--short"]])
def test_a_record_without_a_value_is_named_with_its_line(name, options, results, capsys):
    short = {n: v for n, v in line(Cell(0.1), 0.5, 0.7).items() if n != name}
    results.write_text(results.read_text() + json.dumps(short) + "\n")
    assert run.main(["guidance", *options, "--results", str(results)]) == 2
    assert f"{results}, line 8: has no '{name}'; expected" in capsys.readouterr().err


def test_a_record_of_another_kind_is_named_with_its_line(results, capsys):
    for changes in ({"entropy": 0.5}, {"agreement": [[0.7, 0.1]]}, {"samples": "5"}):
        results.write_text(json.dumps(line(Cell(0.1), 0.5, 0.7) | changes) + "\n")
        assert run.main(["guidance", "--tables", "--results", str(results)]) == 2
        assert f"{results}, line 1: {next(iter(changes))} = " in capsys.readouterr().err


def test_a_cell_that_the_bench_has_not_is_drawn(results):
    results.write_text(json.dumps(line(Cell(0.1, kappa=0.7), 0.5, 0.7)) + "\n")
    forms = guidance_tables.latest(guidance.finished(results), results)
    assert len(guidance_tables.figure(forms).axes) == 2
