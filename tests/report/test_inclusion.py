"""Samples before and after inclusion, from the folder of a real run."""

import pytest
import torch

from dpfast.config import Recipe
from dpfast.evaluate.measures import predict
from dpfast.learn.models import build_learner
from dpfast.ops import entropy
from dpfast.pool.importing import import_pool
from dpfast.practice import checkpoint
from dpfast.report import page
from dpfast.report.inclusion import _with, births, errors_around
from dpfast.report.page import write_report
from dpfast.report.runs import read_run
from tests.practice.conftest import recipe  # noqa: F401 - a fixture
from tests.practice.test_loop import run, with_


@pytest.fixture
def folder(recipe, tmp_path):  # noqa: F811
    """Three rounds of additions, whose checkpoints are kept."""
    run(with_(recipe, "practice", sources=("dp",), keep_rounds=True), tmp_path / "run")
    return tmp_path / "run"


def test_errors_are_those_of_the_learners_of_the_rounds(folder):
    pool, _ = import_pool(folder)
    errors = errors_around(read_run(folder), pool, 3)
    assert errors.offsets == (-2, -1, 0, 1, 2, 3)  # the last: round 1 under the finished learner
    assert errors.hard[2] == 1.0
    assert all(0 <= value <= 1 for value in (*errors.hard, *errors.everything))
    # the learner that guided gave the entropies at birth: it is the one at offset 0
    config = Recipe.from_dict(read_run(folder).recipe).learner
    model = build_learner(config.model, classes=3, channels=1, **config.options)
    kept = checkpoint.load(checkpoint.at_round(folder / "checkpoints_dp", 0))
    rows = torch.arange(30, 45)
    born = pool.column("entropy")[rows]
    torch.testing.assert_close(
        entropy(predict(_with(model, kept.components["trainer"], "ema"), pool.images(rows))), born
    )


def test_the_page_shows_births_and_errors_where_they_are_kept(folder, tmp_path):
    page = write_report([folder], tmp_path / "out").read_text()
    assert (tmp_path / "out" / "inclusion_run.png").is_file()
    assert (tmp_path / "out" / "births_run.png").is_file()
    assert "Hard: those that the learner of their inclusion mistook" in page
    for path in (folder / "checkpoints_dp").glob("*-round-01.*"):
        path.unlink()
    assert (
        "no checkpoints of every round (--keep-rounds true)"
        in write_report([folder], tmp_path / "out").read_text()
    )


def test_births_are_shares_of_the_guided_rounds(folder):
    pool, _ = import_pool(folder)
    (axes,) = births(pool, (7.0, 3.6)).axes
    assert len(axes.patches) == 3  # unguided samples have no entropy at birth
    assert [sum(patch.get_data().values) for patch in axes.patches] == pytest.approx([100.0] * 3)


def test_a_pool_that_is_too_large_for_a_page_is_noted_instead(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 100)
    monkeypatch.setattr(page, "import_pool", lambda *_: pytest.fail("the pool was read"))
    text = write_report([folder], tmp_path / "out").read_text()
    assert "of samples are not read for this page" in text
    assert not list((tmp_path / "out").glob("samples_*"))
