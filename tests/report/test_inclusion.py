"""Samples before and after inclusion, from the folder of a real run."""

import shutil

import pytest
import torch

from dpfast.config import Recipe
from dpfast.evaluate.measures import predict
from dpfast.learn.models import build_learner
from dpfast.ops import entropy
from dpfast.pool.importing import import_pool
from dpfast.pool.subset import read_chosen
from dpfast.practice import checkpoint
from dpfast.report import page
from dpfast.report.inclusion import _with, births, errors_around
from dpfast.report.page import write_report
from dpfast.report.runs import read_run
from tests.practice.conftest import kept_run  # noqa: F401 - a fixture


def test_errors_are_those_of_the_learners_of_the_rounds(kept_run):  # noqa: F811
    pool, _ = import_pool(kept_run)
    errors = errors_around(read_run(kept_run), pool, 3)
    assert errors.offsets == (-2, -1, 0, 1, 2, 3)  # the last: round 1 under the finished learner
    assert errors.hard[2] == 1.0
    assert all(0 <= value <= 1 for value in (*errors.hard, *errors.everything))
    # the learner that guided gave the entropies at birth: it is the one at offset 0
    config = Recipe.from_dict(read_run(kept_run).recipe).learner
    model = build_learner(config.model, classes=3, channels=1, **config.options)
    kept = checkpoint.load(checkpoint.at_round(kept_run / "checkpoints_dp", 0))
    rows = torch.arange(30, 45)
    born = pool.column("entropy")[rows]
    torch.testing.assert_close(entropy(predict(_with(model, kept, "ema"), pool.images(rows))), born)


def test_the_page_shows_births_and_errors_where_they_are_kept(kept_run, tmp_path):  # noqa: F811
    folder = shutil.copytree(kept_run, tmp_path / "run")
    page = write_report([folder], tmp_path / "out").read_text()
    assert page.count("all 70 samples were looked at") == 4  # as text and for a screen reader
    assert (tmp_path / "out" / "inclusion_run.png").is_file()
    assert (tmp_path / "out" / "births_run.png").is_file()
    assert "Hard: those that the learner of their inclusion mistook" in page
    for path in (folder / "checkpoints_dp").glob("*-round-01.*"):
        path.unlink()
    assert (
        "no checkpoints of every round (--keep-rounds true)"
        in write_report([folder], tmp_path / "out").read_text()
    )


def test_births_are_shares_of_the_guided_rounds(kept_run):  # noqa: F811
    pool, _ = import_pool(kept_run)
    (axes,) = births(pool, (7.0, 3.6)).axes
    assert len(axes.patches) == 3  # unguided samples have no entropy at birth
    assert [sum(patch.get_data().values) for patch in axes.patches] == pytest.approx([100.0] * 3)


def test_of_a_pool_of_any_size_a_bounded_part_is_looked_at(kept_run, tmp_path, monkeypatch):  # noqa: F811
    """The page says how many of how many, and holds no more bytes than it may."""
    monkeypatch.setattr(page, "LOOKED", 4 * 5 * 256)  # five images of 16 x 16 of each round
    monkeypatch.setattr(page, "SHOWN", 4 * 3 * 256)
    held = []

    def counted(*given, **more):
        pool = read_chosen(*given, **more)
        held.append(pool.images(torch.arange(len(pool))).numel())
        return pool

    monkeypatch.setattr(page, "read_chosen", counted)
    text = write_report([kept_run], tmp_path / "out").read_text()
    assert held == [page.LOOKED, page.SHOWN]
    assert text.count("20 of 70 samples were looked at") == 4
    assert (tmp_path / "out" / "inclusion_run.png").is_file()
    assert len(list((tmp_path / "out").glob("samples_run_round_*.png"))) == 4
