"""Opening what was saved of a pool: by one process, or by any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpfast.ops.chunk_rows import ChunkTable, take_rows
from dpfast.pool import codecs, shards
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import rank_folder, saved_folders
from dpfast.pool.sharded import ShardLayout

DECODE_THREADS = 4  # of image files that are read again


def open_pool(folder: str | Path, **options: Any) -> SamplePool:
    """Returns the pool that was saved in a folder, every sample and column as it was.

    Where several ranks have saved, it has the samples of all of them, in the order of their ids. A
    damaged shard is quarantined and named in a ``LostSamplesWarning`` with the ids of its samples;
    the rest is opened.

    Args:
        folder: Folder that a ``dpfast.pool.saver.Saver`` or a run has written.
        **options: Arguments of ``SamplePool``; of what one process saved also ``limit`` and
            ``beat`` of ``dpfast.pool.reader.open_folder``.

    Raises:
        DamagedPoolError: Where nothing is saved.
    """
    folder = Path(folder)
    paths = saved_folders(folder)
    if paths in ([], [folder]):
        return open_folder(folder, **options)
    parts = [SavedFolder(path) for path in paths]
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


def open_folder(
    folder: str | Path,
    *,
    limit: int | None = None,
    beat: Callable[[], None] = lambda: None,
    **options: Any,
) -> SamplePool:
    """Returns the pool that one process saved in ``folder``, or its first ``limit`` samples.

    Every shard is checked against the manifest. A damaged one is quarantined and named in a
    ``LostSamplesWarning`` with the ids of its samples; the rest is opened. ``beat`` is called after
    each shard that was read. options: of ``SamplePool``.

    Raises ``DamagedPoolError`` when the folder is no saved pool, or one whose intact part has fewer
    than ``limit`` samples.
    """
    folder = Path(folder)
    manifest = shards.Manifest.read(folder)
    manifest, loaded = shards.load_shards(folder, manifest, beat=beat)
    wanted = manifest.samples if limit is None else limit
    if wanted > manifest.samples:
        raise shards.DamagedPoolError(
            f"{str(folder)!r} holds {manifest.samples} intact samples, {wanted} are needed"
        )
    pool = SamplePool(manifest.codec, **options)
    for part in loaded:
        records = part.records[: wanted - len(pool)]
        if len(records):
            pool.append_records(payload_of(part, records, manifest), records.copy())
        beat()
    return pool


def open_share(
    folder: Path,
    saved: ShardLayout,
    wanted: ShardLayout,
    *,
    beat: Callable[[], None] = lambda: None,
    **options: Any,
) -> SamplePool:
    """Returns the rows of ``wanted.ranks`` out of what the ranks of ``saved`` have saved under
    ``folder``.

    Both have the same rounds and batches, so a batch of one is a batch of the other.
    Raises ``DamagedPoolError`` when a part is missing, or has fewer samples than its rank held.
    """
    ranks = wanted.ranks
    if saved.ranks.size == ranks.size:
        return open_folder(rank_folder(folder, ranks), limit=wanted.held(), beat=beat, **options)
    parts: dict[int, SavedFolder] = {}
    pool: SamplePool | None = None
    for rows in wanted.rows():
        owner, places = saved.locate(torch.arange(rows.start, rows.stop))
        rank = int(owner[0])
        if rank not in parts:
            parts[rank] = SavedFolder(rank_folder(folder, saved.ranks, rank), beat)
        pool = pool or SamplePool(parts[rank].manifest.codec, **options)
        parts[rank].copy(places.numpy(), pool)
        beat()
    if pool is None:
        raise shards.DamagedPoolError(f"{str(folder)!r} holds no samples of {ranks}")
    return pool


class SavedFolder:
    """The samples that one process saved, where they lie: shards are mapped, nothing is copied."""

    def __init__(self, folder: Path, beat: Callable[[], None] = lambda: None) -> None:
        self.manifest, loaded = shards.load_shards(folder, shards.Manifest.read(folder), beat=beat)
        self.folder = folder
        self.shards = list(loaded)
        self.starts = np.cumsum([0, *(len(part.records) for part in self.shards)])

    def copy(self, rows: np.ndarray, pool: SamplePool) -> None:
        """Appends the samples at ``rows``, rising, to ``pool``; ``DamagedPoolError`` where they are
        not there.
        """
        if len(rows) and rows[-1] >= self.starts[-1]:
            raise shards.DamagedPoolError(
                f"{str(self.folder)!r} holds {self.starts[-1]} "
                f"intact samples, {rows[-1] + 1} are needed"
            )
        number = np.searchsorted(self.starts, rows, "right") - 1
        for shard in np.unique(number).tolist():
            part = self.shards[shard]
            records = part.records[rows[number == shard] - self.starts[shard]]
            pool.append_records(payload_of(part, records, self.manifest), records.copy())


def payload_of(
    part: shards.Loaded, records: np.ndarray, manifest: shards.Manifest
) -> torch.Tensor | list[bytes]:
    """Returns the stored payloads of ``records``, some of the shard's, as
    ``SamplePool.append_records`` takes it. Raises ``DamagedPoolError`` for payloads of another size
    than the manifest says.
    """
    offsets = records["offset"]
    lengths = records["length"]
    if manifest.suffix != "npy":
        files = [
            part.data[o : o + n].tobytes()
            for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)
        ]
        if manifest.codec == "jpeg":
            return files
        return torch.from_numpy(codecs.from_image_files(files, threads=DECODE_THREADS))
    assert manifest.shape is not None
    width = codecs.row_bytes(manifest.codec, manifest.shape)
    if (lengths != width).any():
        raise shards.DamagedPoolError(
            f"{part.shard.name}: payloads are not of shape {manifest.shape}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the mapped file is read-only and stays so
        data = torch.from_numpy(part.data)
    table = ChunkTable(len(data), 1).with_chunks([data])
    rows = take_rows(table, torch.from_numpy(offsets.astype(np.int64)), len(data), width=width)
    return rows.view(codecs.DTYPES[manifest.codec]).view(-1, *manifest.shape)
