"""Two uses of the label's evidence: what they choose, and that runs of them are made."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.studies import anchored, uses
from benchmarks.studies.anchored import SHORT
from benchmarks.studies.uses import Evidence, lower_half, most_evident, with_more
from dpfast.ops import guided_step
from tests.benchmarks.test_anchored import best_arm, finished


def test_the_lower_half_is_that_of_a_class():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    score = torch.tensor([5.0, 4.0, 1.0, 2.0, 3.0, 9.0])
    assert lower_half(score, labels).tolist() == [False, True, True, False, False, False]


def test_a_tenth_of_what_is_made_of_a_class_is_dropped():
    wanted = torch.tensor([0, 1]).repeat(9)
    made = with_more(wanted)
    assert made.tolist() == [*wanted.tolist(), 0, 1]
    assert len(with_more(torch.zeros(25, dtype=torch.int64))) == 28
    rows = most_evident(torch.arange(20.0), made, wanted)
    assert made[rows].equal(wanted)
    assert sorted({*range(20)} - {*rows.tolist()}) == [0, 1]
    assert rows[:4].tolist() == [18, 19, 16, 17]


def test_evidence_is_summed_along_the_steps_and_anchors_the_second_half():
    """Two samples of a class, of which the second moves against its label at first."""
    chance = torch.Generator().manual_seed(0)
    x, cond, uncond, grad = torch.randn(4, 2, 1, 4, 4, generator=chance)
    rows = torch.tensor([[0.1, 0.99, 1.1, -0.3, 0.0, 0.0], [0.6, 0.8, 1.2, -0.4, 0.0, 0.0]])
    given = {"cfg_scale": 1.5, "omega": 0.1, "prediction": "v", "mode": "relative"}
    watch = Evidence("kappa", 2)
    first, second = (torch.tensor(index) for index in range(2))

    plain = guided_step(x.clone(), cond, uncond, grad, rows, first, **given)
    assert watch.guided_step(x.clone(), cond, uncond, grad, rows, first, **given).equal(plain)
    assert not len(watch.path)  # nobody's labels: as without the watch

    watch.labels = torch.tensor([3, 3])
    after = watch.guided_step(x.clone(), cond, uncond, grad, rows, first, **given)
    assert after.equal(plain)
    c = 0.1 / 0.99 * (uncond - cond)
    torch.testing.assert_close(watch.path, (c * (plain - x)).flatten(1).sum(1))

    kappas = 1.0 * (watch.path < watch.path.mean())
    assert kappas.sum() == 1
    last = watch.guided_step(after.clone(), cond, uncond, grad, rows, second, **given)
    wanted = guided_step(after.clone(), cond, uncond, grad, rows, second, **given, anchor=kappas)
    assert last.equal(wanted)
    unguided = watch.guided_step(after.clone(), cond, uncond, None, rows, second, **given)
    assert unguided.equal(guided_step(after.clone(), cond, uncond, None, rows, second, **given))


def test_each_use_has_its_kappas():
    labels = torch.tensor([0, 0, 1, 1])
    found = {}
    for use in uses.USES:
        watch = Evidence(use, 8)
        watch.path = torch.tensor([1.0, 2.0, 4.0, 3.0])
        watch._drawn = -watch.path
        found[use] = [watch.anchor(number, labels) for number in (2, 4)]
    listed = {
        use: [None if each is None else each.tolist() for each in kappas]
        for use, kappas in found.items()
    }
    assert listed == {
        "kappa": [None, [1, 0, 0, 1]],
        "drop": [None, None],
        "random": [None, [0, 1, 1, 0]],
        "late": [None, [1, 1, 1, 1]],
        "always": [[0.5] * 4, [0.5] * 4],
    }


@pytest.mark.long
def test_runs_of_both_uses_are_lines_that_the_study_is_beside(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study, results = tmp_path / "anchored.jsonl", tmp_path / "new" / "uses.jsonl"
    lines = finished("confirmation", finished("selection", [], SHORT, best_arm), SHORT)
    study.write_text("".join(json.dumps(each) + "\n" for each in lines))
    command = ["--short", "--study", str(study), "--results", str(results)]
    assert uses.main([*command, "--use", "drop"]) == 0
    assert uses.main([*command, "--use", "kappa", "--use", "drop"]) == 0  # the other one
    made = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(each["arm"], each["seed"], each["samples"]) for each in made] == [
        ("drop", 3, 80),
        ("drop", 4, 80),
        ("kappa", 3, 80),
        ("kappa", 4, 80),
    ]
    # a round of 10 makes one of each class, and one of each again to drop the lesser
    assert made[0]["samples_made"] == 20 + 6 * 20
    assert made[2]["samples_made"] == 80
    assert [run.fields for run in uses.wanted_runs("kappa", lines, SHORT)] == [
        each["fields"] for each in made[2:]
    ]
    capsys.readouterr()
    assert uses.main([*command, "--tables"]) == 0
    assert "| drop | 2 | " in capsys.readouterr().out
    study.write_text("")
    with pytest.raises(anchored.InputError, match="run dpfast bench anchored first"):
        uses.main(command)
