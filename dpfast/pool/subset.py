"""A bounded part of a saved pool of any size, for figures: so many samples of each round, chosen by
their ids.

The choice reads the columns of every shard, 56 bytes a sample, a part of them at a time; of the
payloads, which may be terabytes, only those that were chosen. What is held follows the number of
rounds and classes, not that of the samples.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpfast.errors import InputError
from dpfast.pool import codecs, shards
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import saved_folders
from dpfast.pool.reader import payload_of
from dpfast.pool.record import RECORD

PER_ROUND = 2000  # samples of a round that are chosen at most
CLASSES, PER_CLASS = 10, 12  # and beside them of the first classes, of each in a round
COLUMNS = 1 << 20  # columns of candidates that are held at a time
BATCH = 64  # payloads that are read at a time
PLACED = np.dtype([*RECORD.descr, ("folder", "<i4"), ("shard", "<i4")])


@dataclass(frozen=True)
class Choice:
    """Samples of a saved pool, and how many it has.

    looked: (n,) ``PLACED``, at most ``PER_ROUND`` of each round, those whose ids hash lowest;
    shown: (m,) the same, at most ``PER_CLASS`` of each of the first ``CLASSES`` labels in each
    round; total: samples of the pool; lost: those of them that cannot be read; top: the largest
    label.
    """

    folders: Sequence[Path]
    manifests: Sequence[shards.Manifest]
    looked: np.ndarray
    shown: np.ndarray
    total: int
    lost: int
    top: int

    @property
    def classes(self) -> list[str] | None:
        """The names of the labels, where they are known."""
        return self.manifests[0].classes


def choose(folder: Path) -> Choice | None:
    """Chooses samples of the pool that was saved in ``folder``, by one process or by ranks.

    The same samples of the same pool each time, and of one that has grown those of before unless
    new ones of their round took their places. No shard is read as a whole, so none is checked
    against its checksum: one whose size or columns are wrong is passed over, and stays where it is.

    Returns None where nothing is saved. Raises ``DamagedPoolError`` and ``UnreadableError`` as
    ``Manifest.read`` does.
    """
    folders = saved_folders(folder)
    if not folders:
        return None
    total = lost = held = 0
    top = -1
    parts = [np.empty(0, PLACED)]
    manifests = [shards.Manifest.read(part) for part in folders]
    for number, (part, manifest) in enumerate(zip(folders, manifests, strict=True)):
        lost += sum(shard.samples for shard in manifest.quarantined)
        total += sum(shard.samples for shard in (*manifest.shards, *manifest.quarantined))
        for place, shard in enumerate(manifest.shards):
            found = shards.opened(part, shard)
            if isinstance(found, str):
                warnings.warn(f"{part / shard.name} is passed over: {found}", stacklevel=2)
                lost += shard.samples
                continue
            placed = np.zeros(len(found.records), PLACED)
            for name in RECORD.names or ():
                placed[name] = found.records[name]
            placed["folder"], placed["shard"] = number, place
            top = max(top, int(placed["label"].max(initial=-1)))
            parts.append(placed)
            held += len(placed)
            if held > COLUMNS:
                parts = [_candidates(parts)]
                held = 0
    left = _candidates(parts)
    of_first = left[np.isin(left["label"], np.unique(left["label"])[:CLASSES])]
    return Choice(
        folders,
        manifests,
        left[_rank(left, ("round",)) < PER_ROUND],
        of_first[_rank(of_first, ("round", "label")) < PER_CLASS],
        total,
        lost,
        top,
    )


def _candidates(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns those records of all ``parts`` that may be chosen, whatever follows."""
    records = np.concatenate(parts)
    low = _rank(records, ("round",)) < PER_ROUND
    return records[low | (_rank(records, ("round", "label")) < PER_CLASS)]


def _rank(records: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Returns (n,) int64: the place of each record in the order by its id's hash, within its
    group.
    """
    keys = [records[name] for name in groups]
    order = np.lexsort((_hashed(records["sample_id"]), *keys))
    new = np.zeros(len(order), bool)
    for key in keys:
        new[1:] |= np.diff(key[order]) != 0
    starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order)) - starts
    return ranks


def _hashed(ids: np.ndarray) -> np.ndarray:
    """Returns the ids mixed up, (n,) uint64: the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def read_chosen(
    choice: Choice, chosen: np.ndarray, limit: int, *, decode: codecs.Decode | None = None
) -> SamplePool:
    """Returns the samples ``chosen``, of a choice's columns, as a pool in host memory: of pixels,
    in which latents are decoded, or of JPEG files.

    limit: bytes of their images, or of their files. Where they have more, fewer are read: of each
    round equally many, those whose ids hash lowest. At least one of each round is read.
    decode: of latents, as of ``SamplePool``.

    Payloads that are damaged are passed over with a warning. Raises ``InputError`` for latents
    without ``decode``.
    """
    if len(chosen):
        size = _bytes(choice, chosen, decode)
        rounds = len(np.unique(chosen["round"]))
        chosen = chosen[_rank(chosen, ("round",)) < max(1, limit // (size * rounds))]
    chosen = chosen[np.lexsort((chosen["offset"], chosen["shard"], chosen["folder"]))]
    pool: SamplePool | None = None
    for images, records in _batches(choice, chosen, decode):
        pool = pool or SamplePool("pixels" if isinstance(images, torch.Tensor) else "jpeg")
        pool.append_records(images, records)
    return pool or SamplePool()


def _bytes(choice: Choice, chosen: np.ndarray, decode: codecs.Decode | None) -> int:
    """Returns bytes that a chosen sample takes in memory, at most."""
    images, _ = next(_batches(choice, chosen[:1], decode), (None, None))
    return images[0].numel() if isinstance(images, torch.Tensor) else int(chosen["length"].max())


def _batches(
    choice: Choice, chosen: np.ndarray, decode: codecs.Decode | None
) -> Iterator[tuple[torch.Tensor | list[bytes], np.ndarray]]:
    """Yields payloads and records of the ``chosen``, which are sorted by where they lie."""
    for (number, place), rows in itertools.groupby(
        range(len(chosen)), lambda row: (chosen["folder"][row], chosen["shard"][row])
    ):
        folder, manifest = choice.folders[number], choice.manifests[number]
        shard = manifest.shards[place]
        of_shard = chosen[list(rows)]
        records = np.empty(len(of_shard), RECORD)
        for name in RECORD.names or ():
            records[name] = of_shard[name]
        for start in range(0, len(records), BATCH):
            part = records[start : start + BATCH]
            try:
                data, placed = _spans(folder / shard.name, part)
                payload = payload_of(shards.Loaded(shard, placed, data), placed, manifest)
            except InputError as error:
                warnings.warn(
                    f"{folder / shard.name}: {len(part)} samples are passed over: {error}",
                    stacklevel=3,
                )
                continue
            if manifest.codec == "latents":
                latents = SamplePool("latents", decode=decode)
                latents.append_records(payload, part.copy())
                payload = latents.images(torch.arange(len(part)))
            yield payload, part.copy()


def _spans(path: Path, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the payloads of ``records`` of a shard, one behind the other, and the records with
    where they lie there.

    They are read, not mapped, where each page is a fault of its own: 1,782 images of 224 px took
    4 s in place of 44 (measured).
    """
    placed = records.copy()
    parts = []
    with path.open("rb") as file:
        for offset, length in zip(
            records["offset"].tolist(), records["length"].tolist(), strict=True
        ):
            file.seek(offset)
            parts.append(file.read(length))
    placed["offset"] = np.cumsum([0, *map(len, parts)])[:-1]
    if [len(part) for part in parts] != records["length"].tolist():
        raise shards.DamagedPoolError(f"{path} ends before a payload does")
    return np.frombuffer(b"".join(parts), np.uint8), placed
