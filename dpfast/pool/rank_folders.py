"""The saved pools of several ranks: a folder for each, and how any number of ranks reads them.

    pool_dp/rank-000-of-002/       a saved pool (``dpfast.pool.shards``) of the rows that this rank
                                   holds, in order
    pool_dp/rank-001-of-002/

One process alone saves into the folder itself. A run that goes on with another number of ranks
reads the old parts, holds other rows and saves them anew beside the old ones, which are removed
when no checkpoint needs them any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpfast.parallel import Ranks
from dpfast.pool import shards
from dpfast.pool.pool import SamplePool
from dpfast.pool.saver import open_pool, payload_of
from dpfast.pool.sharded import ShardLayout

PARTS = "rank-*-of-*"


def part_name(ranks: Ranks, rank: int | None = None) -> str:
    """Of the folder of ``rank``, this one by default."""
    return f"rank-{ranks.rank if rank is None else rank:03d}-of-{ranks.size:03d}"


def part_folder(folder: Path, ranks: Ranks, rank: int | None = None) -> Path:
    """Where a rank saves its samples under ``folder``, the saved pool of a run."""
    return folder if ranks.alone else folder / part_name(ranks, rank)


def parts_of(folder: Path) -> list[Path]:
    """The saved pools that make one: ``folder`` itself, or its parts; of several the one with the
    most samples.

    Empty where nothing is saved.
    """
    names = {path.name.rsplit("-", 1)[1] for path in folder.glob(PARTS) if path.is_dir()}
    found = [[folder]] if (folder / shards.MANIFEST).is_file() else []
    found += [sorted(folder.glob(f"rank-*-of-{name}")) for name in sorted(names)]
    saved = [[path for path in paths if (path / shards.MANIFEST).is_file()] for paths in found]
    return max(
        saved,
        key=lambda paths: sum(shards.Manifest.read(path).samples for path in paths),
        default=[],
    )


def remove_parts(folder: Path, sizes: Collection[int]) -> None:
    """Removes under ``folder``, the saved pool of a run, what other numbers of ranks than ``sizes``
    have saved.

    A part's manifest goes first: killed on the way, the rest is no saved pool, and who saves there
    begins anew.
    """
    entries = list(folder.iterdir())
    parts = [entry for entry in entries if entry.match(PARTS)]
    for part in (part for part in parts if int(part.name.rsplit("-", 1)[1]) not in sizes):
        _forget(part)
        shutil.rmtree(part)
    own = [entry for entry in entries if entry not in parts]
    if 1 not in sizes and own:
        _forget(folder)
        for entry in own:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def _forget(part: Path) -> None:
    (part / shards.MANIFEST).unlink(missing_ok=True)
    shards.sync_folder(part)


class _Saved:
    """The samples of one saved pool, where they lie: its shards are mapped, nothing is copied."""

    def __init__(self, folder: Path, beat: Callable[[], None] = lambda: None) -> None:
        self.manifest, loaded = shards.load_shards(folder, shards.Manifest.read(folder), beat=beat)
        self.folder, self.shards = folder, list(loaded)
        self.starts = np.cumsum([0, *(len(part.records) for part in self.shards)])

    def copy(self, rows: np.ndarray, pool: SamplePool) -> None:
        """Appends the samples at ``rows``, rising, to ``pool``; ``DamagedPoolError`` where they are
        not there.
        """
        if len(rows) and rows[-1] >= self.starts[-1]:
            raise shards.DamagedPoolError(
                f"{str(self.folder)!r} holds {self.starts[-1]} intact samples, {rows[-1] + 1} are "
                "needed"
            )
        number = np.searchsorted(self.starts, rows, "right") - 1
        for shard in np.unique(number).tolist():
            part = self.shards[shard]
            records = part.records[rows[number == shard] - self.starts[shard]]
            pool.append_records(payload_of(part, records, self.manifest), records.copy())


def open_all(folder: Path, **options: Any) -> SamplePool:
    """The pool of a run as one, whoever saved it: ``open_pool`` of its parts, in the order of
    sample ids.

    Raises ``DamagedPoolError`` where nothing is saved.
    """
    paths = parts_of(folder)
    if paths in ([], [folder]):
        return open_pool(folder, **options)
    parts = [_Saved(path) for path in paths]
    pool = SamplePool(parts[0].manifest.codec, **options)
    held = [
        np.concatenate([np.empty(0, np.int64), *(s.records["sample_id"] for s in part.shards)])
        for part in parts
    ]
    source, row = (
        np.concatenate(column)
        for column in zip(
            *((np.full(len(h), i), np.arange(len(h))) for i, h in enumerate(held)), strict=True
        )
    )
    order = np.argsort(np.concatenate(held), kind="stable")
    for run in np.split(order, np.flatnonzero(np.diff(source[order])) + 1):
        parts[source[run[0]]].copy(row[run], pool)
    return pool


def open_part(
    folder: Path,
    saved: ShardLayout,
    wanted: ShardLayout,
    *,
    beat: Callable[[], None] = lambda: None,
    **options: Any,
) -> SamplePool:
    """The rows of ``wanted.ranks`` out of what the ranks of ``saved`` have saved under ``folder``.

    Both have the same rounds and batches, so a batch of one is a batch of the other.
    Raises ``DamagedPoolError`` when a part is missing, or has fewer samples than its rank held.
    """
    ranks = wanted.ranks
    if saved.ranks.size == ranks.size:
        return open_pool(part_folder(folder, ranks), limit=wanted.held(), beat=beat, **options)
    parts: dict[int, _Saved] = {}
    pool: SamplePool | None = None
    for rows in wanted.rows():
        owner, places = saved.locate(torch.arange(rows.start, rows.stop))
        rank = int(owner[0])
        if rank not in parts:
            parts[rank] = _Saved(part_folder(folder, saved.ranks, rank), beat)
        pool = pool or SamplePool(parts[rank].manifest.codec, **options)
        parts[rank].copy(places.numpy(), pool)
        beat()
    if pool is None:
        raise shards.DamagedPoolError(f"{str(folder)!r} holds no samples of {ranks}")
    return pool
