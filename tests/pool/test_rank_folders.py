"""What other numbers of ranks have saved goes away, and a kill on the way loses nothing."""

import itertools
import os
import shutil

import pytest
import torch

from dpfast.parallel import Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import (
    rank_folder,
    rank_folders,
    remove_rank_folders,
    saved_folders,
)
from dpfast.pool.reader import open_pool
from dpfast.pool.saver import Saver
from tests.pool.helpers import ORIGIN, batch, check_prefix

SIZES, COUNT, BATCH = (1, 2, 3), 60, 10


def part(ranks):
    pool = SamplePool(chunk_bytes=1 << 14)
    for places in ranks.batches(COUNT, BATCH):
        pool.append(batch(places.start, len(places)), round=0, **ORIGIN)
    return pool


def save(folder, size, **options):
    for ranks in (Ranks(rank=rank, size=size) for rank in range(size)):
        with Saver(part(ranks), rank_folder(folder, ranks), shard_samples=20, **options) as saver:
            saver.save()


@pytest.fixture
def saved(tmp_path):
    """A folder in which one, two and three ranks have saved the same samples."""
    for size in SIZES:
        save(tmp_path / "pool", size)
    return tmp_path / "pool"


@pytest.mark.parametrize("kept", [{1}, {2}, {1, 3}])
def test_what_no_checkpoint_needs_is_removed(saved, kept):
    before = {size: sorted(rank_folder(saved, Ranks(size=size)).glob("*.tar")) for size in kept}
    remove_rank_folders(saved, kept)
    names = {path.name for path in saved.iterdir()}
    expected = {f"rank-{rank:03d}-of-{size:03d}" for size in kept - {1} for rank in range(size)}
    assert {name for name in names if name.startswith("rank-")} == expected
    assert ("manifest.json" in names) == (1 in kept)
    assert before == {
        size: sorted(rank_folder(saved, Ranks(size=size)).glob("*.tar")) for size in kept
    }
    check_prefix(open_pool(saved), COUNT)


class KillError(BaseException):
    """In the place of a kill."""


@pytest.mark.parametrize("kept", SIZES)
def test_a_kill_while_parts_are_removed_loses_nothing(saved, kept, tmp_path, monkeypatch):
    for moment in itertools.count():
        folder, left = shutil.copytree(saved, tmp_path / f"{moment}"), itertools.count(moment, -1)
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, killed_at_zero(getattr(os, name), left))
            try:
                remove_rank_folders(folder, {kept})
                break
            except KillError:
                pass
        check_prefix(open_pool(folder), COUNT)
        for size in SIZES:  # whoever goes on from here saves what is missing
            save(folder, size, truncate=True)
            parts = [rank_folder(folder, Ranks(rank=rank, size=size)) for rank in range(size)]
            held = [open_pool(path).column("sample_id") for path in parts]
            assert torch.equal(torch.cat(held).sort().values, torch.arange(COUNT))
        remove_rank_folders(folder, {kept})
        check_prefix(open_pool(folder), COUNT)
    assert moment > 10


def killed_at_zero(function, left):
    def until_then(*arguments, **options):
        if next(left) == 0:
            raise KillError
        return function(*arguments, **options)

    return until_then


def test_a_backup_of_a_rank_s_folder_is_none_and_stays(tmp_path):
    names = ("rank-000-of-002", "rank-001-of-002", "rank-000-of-003")
    others = ("rank-000-of-002.bak", "rank-000-of-002 (copy)", "rank-x-of-002", "rank-0-of-y")
    for name in (*names, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert {path.name: size for path, size in rank_folders(tmp_path).items()} == {
        "rank-000-of-002": 2,
        "rank-001-of-002": 2,
        "rank-000-of-003": 3,
    }
    remove_rank_folders(tmp_path, {3})
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted(("rank-000-of-003", *others))
    assert rank_folders(tmp_path / "none") == {}
    assert saved_folders(tmp_path / "none") == []
