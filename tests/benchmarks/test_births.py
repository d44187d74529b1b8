"""What new samples are at their birth: shares counted by hand, and a run that stays what it was."""

from __future__ import annotations

import pytest
import torch

from benchmarks.studies import births
from benchmarks.studies.births_tables import births_tables
from dpfast.config import Recipe
from dpfast.data import fashion
from dpfast.data.real import RealData, load_real
from dpfast.pool.pool import SamplePool
from dpfast.practice.experiment import DeliberatePractice
from dpfast.samples import SampleBatch


def test_shares_are_of_all_samples():
    yes, no = True, False
    first, second = torch.tensor([yes, yes, no, yes]), torch.tensor([yes, no, no, yes])
    learner = torch.tensor([no, no, no, yes])
    assert births.shares([first, second], learner) == {
        "samples": 4,
        "judges": [0.75, 0.5],
        "agreed": 0.5,
        "learner_wrong": 0.75,
        "useful": 0.25,  # the first alone: the second judge doubts the second one's label
    }
    assert births.shares([first]) == {"samples": 4, "judges": [0.75], "agreed": 0.75}


def line(arm: str, agreed: tuple[float, ...], **found) -> dict:
    """A run's line whose rounds have these shares."""
    diverse = {"frechet": 2.0, "precision": 0.9, "recall": 0.5}
    rounds = [
        {"round": number, "agreed": share, "useful": 0.2, "learner_wrong": 0.3}
        for number, share in enumerate(agreed, 1)
    ]
    added = {**rounds[0], **diverse} if rounds else None
    told = {"added": added, "rounds": rounds, "pool": diverse}
    return {"part": "selection", "arm": arm, "size": 2000, "nearest": 0.1, "births": told, **found}


def test_tables_are_means_over_the_runs_of_an_arm():
    lines = [
        line("omega 0.1", (0.9, 0.7)),
        line("omega 0.1", (0.8,), nearest=0.2),
        line("static", (), nearest=None),
        line("static", (), births=None),
    ]
    text = list(births_tables(lines))
    assert (
        "| selection, omega 0.1, 2,000 | 2 | 85.0 | 30.0 | 20.0 | 0.150 | 2.00 | 90.0 | 50.0 |"
        in (text)
    )
    assert "| selection, static, 2,000 | 1 |  |  |  |  | 2.00 | 90.0 | 50.0 |" in text
    by_round = "| selection, omega 0.1, 2,000 | 85.0 / 20.0 / 30.0 | 70.0 / 20.0 / 30.0 |"
    assert by_round in text
    assert list(births_tables([lines[-1]])) == []


def test_one_class_is_less_diverse_than_all_of_them():
    points, radii = births.real_features()
    assert points.shape == (5000, 256)
    assert float(radii.min()) > 0
    some = births.diversity(points[::5])
    assert some["precision"] == 1.0
    assert some["recall"] > 0.8
    assert some["frechet"] < 0.5
    one_class = births.diversity(points[births.judges()[0].model.classifier(points).argmax(1) == 0])
    assert one_class["precision"] == 1.0
    assert one_class["recall"] < 0.2
    assert one_class["frechet"] > 1


def few_real_images():
    test = load_real("fashion").test
    return RealData.split(test.images[:100], test.labels[:100], fashion.CLASSES)


@pytest.fixture(scope="module")
def runs():
    """A short run that is not watched, the same one that is, and what was measured."""
    fields = {"sources": "dp", "steps": 4, "every": 2, "iterations": 100, "evaluate_every": 5}
    sizes = {
        "initial_samples": 20,
        "round_samples": 10,
        "maximum_samples": 40,
        "omega": 0.1,
        "yardstick_samples": 20,
    }
    recipe = Recipe.load("fashion", **fields, **sizes)
    (plain,) = DeliberatePractice(recipe, real=few_real_images()).run(progress=False)
    practice = DeliberatePractice(recipe, real=few_real_images())
    watching = births.Births(practice)
    (watched,) = practice.run(progress=False, callbacks=[watching])
    return plain, watched, watching


def test_watching_changes_nothing(runs):
    plain, watched, _ = runs
    assert torch.equal(plain.pool.images(torch.arange(40)), watched.pool.images(torch.arange(40)))
    weights = zip(plain.learner.parameters(), watched.learner.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_run_is_told_by_round_and_as_a_whole(runs):
    _, _, watching = runs
    found = watching.measured()
    assert [told["round"] for told in found["rounds"]] == [1, 2]
    assert [told["samples"] for told in found["rounds"]] == [10, 10]
    assert found["initial"]["samples"] == found["added"]["samples"] == 20
    for name in ("agreed", "learner_wrong", "useful"):
        mean = sum(told[name] for told in found["rounds"]) / 2
        assert found["added"][name] == pytest.approx(mean)
    assert all(told["useful"] <= told["learner_wrong"] for told in found["rounds"])
    assert len(found["added"]["judges"]) == len(births.judges()) == 2
    assert found["added"]["agreed"] <= min(found["added"]["judges"])
    assert found["added"].keys() > found["pool"].keys() == {"frechet", "precision", "recall"}


def test_the_learner_is_asked_before_it_is_trained_on_a_round(runs):
    """At birth it is wrong about hard samples that it knows at the end."""
    _, watched, watching = runs
    rows = torch.arange(20, 40)
    labels = watched.pool.column("label")[rows]
    end = births.predict(watched.learner, watched.pool.images(rows)).argmax(1) == labels
    assert watching.measured()["added"]["learner_wrong"] > 1 - float(end.float().mean())


def test_a_run_without_rounds_has_no_added_samples():
    sizes = {"initial_samples": 20, "maximum_samples": 20, "steps": 2}
    practice = DeliberatePractice(
        Recipe.load("fashion", sources="static", iterations=20, evaluate_every=10, **sizes),
        real=few_real_images(),
    )
    watching = births.Births(practice)
    practice.run(progress=False, callbacks=[watching])
    found = watching.measured()
    assert found["added"] is None
    assert found["rounds"] == []
    assert found["initial"]["samples"] == 20


def test_new_samples_are_measured_against_earlier_ones_of_their_class():
    pool = SamplePool()
    for number, (level, labels) in enumerate(
        (((0, 200), [0, 1]), ((51, 251), [0, 1]), ((51, 251), [0, 0]))
    ):
        images = (
            torch.tensor(level, dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous()
        )
        ids = torch.arange(2) + 2 * number
        batch = SampleBatch(
            images=images, labels=torch.tensor(labels), sample_ids=ids, entropy=torch.zeros(2)
        )
        pool.append(batch, round=number, omega=0.0)
        if number == 0:
            assert births.nearest_earlier(pool) is None
    assert births.nearest_earlier(pool) == pytest.approx((51 + 51 + 0 + 200) / 4 / 255)
