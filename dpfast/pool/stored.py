"""A saved pool, sample by sample: the columns at once, the payloads when they are asked for.

``dpfast.pool.reader`` opens whole pools into memory. Here a sample is read where it lies: a shard
is checked against the manifest and mapped when the first of its samples is asked for, and nothing
in the folder is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dpfast.errors import InputError
from dpfast.files import is_folder
from dpfast.pool import shards
from dpfast.pool.importing import import_pool, saved_pool
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import saved_folders
from dpfast.pool.reader import payload_of
from dpfast.pool.record import RECORD
from dpfast.pool.snapshot import Payload


class Stored(Protocol):
    """Samples that exist: their columns, and payloads by row."""

    codec: str
    classes: list[str] | None
    records: np.ndarray

    @property
    def shape(self) -> Sequence[int] | None:
        """The shape (C, H, W) of a payload; None for JPEG."""
        ...

    def payload(self, rows: np.ndarray) -> Payload:
        """Returns the stored payloads of the samples at ``rows`` (n,), as ``PoolSnapshot.payload``
        gives it. Raises ``DamagedPoolError`` where it is not there, or other than was saved.
        """
        ...


@dataclass
class InMemory:
    """``Stored`` of a pool in memory."""

    pool: SamplePool
    classes: list[str] | None

    def __post_init__(self) -> None:
        self.codec = self.pool.codec
        self.shape = self.pool.shape
        self.records = self.pool.records()

    def payload(self, rows: np.ndarray) -> Payload:
        return self.pool.payload(torch.from_numpy(rows))


class OnDisk:
    """``Stored`` of a saved pool: of one process, or of all ranks in the order of the ids, as
    ``open_pool`` has it.

    Raises ``DamagedPoolError`` where nothing is saved.
    """

    def __init__(self, folder: Path, *, beat: Callable[[], None] = lambda: None) -> None:
        parts = saved_folders(folder)
        if not parts:
            raise shards.DamagedPoolError(f"{str(folder)!r} holds no saved pool")
        self._parts = [(part, shards.Manifest.read(part)) for part in parts]
        self._shards = [
            (part, shard) for part, (_, found) in enumerate(self._parts) for shard in found.shards
        ]
        columns = [np.empty(0, RECORD)]
        for part, shard in self._shards:
            columns.append(_columns(parts[part], shard))
            beat()
        records = np.concatenate(columns)
        counts = [shard.samples for _, shard in self._shards]
        owner = np.repeat(np.arange(len(counts)), counts)
        place = np.concatenate([np.empty(0, np.int64), *(np.arange(count) for count in counts)])
        order = np.arange(len(records))
        if len(parts) > 1:
            order = np.argsort(records["sample_id"], kind="stable")
        self.records = records[order]
        self._shard, self._place = owner[order].astype(np.int32), place[order].astype(np.int32)
        first = self._parts[0][1]
        self.codec, self.shape, self.classes = first.codec, first.shape, first.classes
        self._loaded: dict[int, shards.Loaded] = {}

    def payload(self, rows: np.ndarray) -> Payload:
        files: list[bytes | None] = [None] * len(rows)
        tensor: torch.Tensor | None = None
        for number in np.unique(self._shard[rows]).tolist():
            chosen = np.flatnonzero(self._shard[rows] == number)
            loaded = self._shard_at(number)
            records = loaded.records[self._place[rows[chosen]]]
            found = payload_of(loaded, records, self._parts[self._shards[number][0]][1])
            if isinstance(found, torch.Tensor):
                if tensor is None:
                    tensor = found.new_empty(len(rows), *found.shape[1:])
                tensor[torch.from_numpy(chosen)] = found
            else:
                for row, file in zip(chosen.tolist(), found, strict=True):
                    files[row] = file
        if tensor is not None:
            return tensor
        return [file for file in files if file is not None]

    def _shard_at(self, number: int) -> shards.Loaded:
        if number not in self._loaded:
            part, shard = self._shards[number]
            self._loaded[number] = _verified(self._parts[part][0], shard)
        return self._loaded[number]


def _columns(folder: Path, shard: shards.Shard) -> np.ndarray:
    """Returns the records of a shard, of its columns file where that is whole."""
    found = shards.read_columns(folder, shard)
    if found is None or found.dtype != RECORD or len(found) != shard.samples:
        return _verified(folder, shard).records
    return found


def _verified(folder: Path, shard: shards.Shard) -> shards.Loaded:
    loaded = shards.verify(folder, shard)
    if isinstance(loaded, str):
        raise shards.DamagedPoolError(f"{folder / shard.name}: {loaded}")
    return loaded


def open_stored(folder: Path, *, beat: Callable[[], None] = lambda: None) -> Stored:
    """Returns the samples of a folder as ``import_pool`` takes it: those that dpfast has saved stay
    where they are, of another's dataset all are in host memory.

    Raises what ``import_pool`` raises.
    """
    try:
        saved = saved_pool(folder) if is_folder(folder) else None
        if saved is not None:
            return OnDisk(saved, beat=beat)
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be read: {error}") from None
    return InMemory(*import_pool(folder, done=lambda count: beat()))
