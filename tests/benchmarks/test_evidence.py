"""Scores of a trajectory: counted by hand, and of samples that were made."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks import run
from benchmarks.studies import evidence
from dpfast.report.sweeps import measured_cells


def test_areas_are_counted_pair_by_pair():
    score, wrong = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([True, False, True, False])
    # of the pairs (1, 2), (1, 3), (2, 2), (2, 3) three are in order and one is a tie
    assert evidence.auc(score, wrong) == 3.5 / 4
    assert evidence.auc(score, ~wrong) == pytest.approx(0.5 / 4)
    assert evidence.auc(score, torch.zeros(4, dtype=torch.bool)) is None


def test_a_score_that_only_knows_the_class_is_worth_nothing_within_it():
    labels = torch.tensor([0, 1]).repeat(20)
    score, wrong = -labels.float(), torch.arange(40) % 4 == 1  # half of class 1
    assert evidence.auc(score, wrong) > 0.8
    assert evidence.auc_within(score, wrong, labels) == 0.5
    better = score + 0.1 * (~wrong)
    assert evidence.auc_within(better, wrong, labels) == 1.0
    assert evidence.auc_within(score, torch.zeros_like(wrong), labels) is None


def test_the_lowest_of_each_class_are_dropped():
    labels = torch.tensor([0, 1]).repeat(10)
    score = torch.arange(20.0)
    stay = evidence.kept(score, labels)
    assert sorted(set(range(20)) - set(stay.tolist())) == [0, 1]
    wrong, useful = score < 2, score > 17
    found = evidence.judged(score, wrong, useful, labels)
    assert (found["denied"], found["useful"]) == (0.0, pytest.approx(2 / 18))


def test_pruning_keeps_the_hardest():
    entropy = torch.arange(20.0)
    found = evidence.hardest(entropy, entropy > 17, entropy > 9)
    assert [row["keep"] for row in found] == list(evidence.HARDEST)
    assert [row["wrong"] for row in found] == [1.0] * 4
    assert [row["denied"] for row in found] == pytest.approx([0.2, 0.4, 1.0, 1.0])


def test_a_trajectory_towards_the_label_has_evidence_for_it():
    """Two steps of a denoiser whose label asks for 1 where it asks for 0 without: samples that end
    at 1 and at 0, and one that is moved against the label.
    """
    trajectory = evidence.Trajectory()
    x0 = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1, 1)
    noise = torch.tensor([0.3, 0.3, 0.3]).view(3, 1, 1, 1)
    scales = [(0.6, 0.8), (0.8, 0.6), (1.0, 0.0)]
    for (alpha, sigma), (alpha_next, sigma_next) in itertools.pairwise(scales):
        x, following = alpha * x0 + sigma * noise, alpha_next * x0 + sigma_next * noise
        eps_c, eps_u = (x - alpha) / sigma, x / sigma
        ends = torch.tensor(alpha), torch.tensor(sigma)
        trajectory.steps.append((x, following, eps_c, eps_u, *ends))
    found = trajectory.scores(x0)
    for name in ("path", "hindsight"):
        assert found[name][0] > found[name][1] > found[name][2], name
    assert found["alignment"][0] > found["alignment"][1]  # of one pixel: 1 or -1 in each step
    # e is the noise itself: |e - eps_u|^2 - |e - eps_c|^2 = (alpha / sigma)^2 (x0^2 - (x0 - 1)^2)
    weight = (0.6 / 0.8) ** 2 + (0.8 / 0.6) ** 2
    assert found["hindsight"].tolist() == pytest.approx([weight, -weight, -3 * weight])
    # c = alpha / sigma^2, whatever the sample
    assert found["fisher"].tolist() == pytest.approx([-((0.6 / 0.64) ** 2 + (0.8 / 0.36) ** 2)] * 3)


def test_a_short_run_leaves_a_line_for_each_form(tmp_path, capsys):
    results = tmp_path / "evidence.jsonl"
    assert evidence.main(["--short", "--count", "20", "--results", str(results)]) == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["omega"], line["kappa"]) for line in lines] == [(0.12, 0.0), (0.12, 0.5)]
    for line in lines:
        assert line["useful"][0] == pytest.approx(line["wrong"][0] * line["right_of_wrong"][-1][0])
    assert [cell[:2] for cell in measured_cells(results)] == [(0.12, 0.0), (0.12, 0.5)]
    names = ["path", "early", "fisher", "hindsight", "alignment", "whole", "label loss"]
    assert sorted(lines[0]["scores"]) == sorted(names)
    printed = capsys.readouterr().out
    assert evidence.main(["--tables", "--results", str(results)]) == 0
    assert capsys.readouterr().out == printed


RECORD = {
    "omega": 0.12,
    "kappa": 0.5,
    "agreement": [[0.9, 0.01]],
    "useful": [0.1, 0.01],
    "scores": {"path": {"auc": 0.7, "auc_within": None, "denied": 0.1, "useful": 0.2}},
}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scores": {"path": {"auc": 0.7}}}, "scores = "),
        ({"useful": 0.1}, "useful = 0.1: expected a mean and its error"),
        ({"omega": "0.12"}, "omega = '0.12': expected a number"),
    ],
)
def test_a_record_of_another_kind_is_named_with_its_line(changes, told, tmp_path, capsys):
    results = tmp_path / "evidence.jsonl"
    command = ["evidence", "--results", str(results), "--short"]
    results.write_text(json.dumps(RECORD) + "\n")
    assert run.main([*command, "--tables"]) == 0
    for line in (RECORD | changes, {n: v for n, v in RECORD.items() if n not in changes}):
        results.write_text(json.dumps(line) + "\n")
        for options in ([], ["--tables"]):
            assert run.main([*command, *options]) == 2
            name = next(iter(changes))
            wanted = told if name in line else f"has no '{name}'; expected"
            assert f"{results}, line 1: {wanted}" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["evidence", "anchored", "study"])
def test_results_that_are_no_file_are_told_before_any_run(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("")
    for options, told in (
        (["--tables", "--results", "nosuch"], "results = 'nosuch': no such file"),
        (["--tables", "--results", "."], "results = '.': is a folder, expected a file"),
        (["--results", "."], "results = '.': is a folder, expected a file"),
        (["--results", "text/x.jsonl"], "is no folder"),
    ):
        assert run.main([suite, "--short", *options]) == 2
        assert told in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["text"]
