"""Samples on a disk: webdataset tar shards, a manifest with checksums, and what to do when a file
is damaged.

    manifest.json                  what the folder promises: codec, shape, and every shard with
                                   size, SHA-256 and ids
    shard-000000.tar               000000-000000.npy|.png|.jpg, .cls (the label) and .json (all
                                   columns) of each sample
    shard-000000.columns.npy       the same columns as one array of ``RECORD``; offsets are those of
                                   payloads in the tar
    quarantine/                    shards that did not match their checksum

Every file is written under a temporary name, fsynced, renamed, and the folder fsynced, before the
manifest names it. A file that the manifest does not name does not exist. The manifest is written
anew for each shard: over 10 M samples of one rank 8 GB beside 1.5 TB (docs/records/scaling.md).
The columns file is a copy for speed: without it, or where it is damaged, the columns come from
the tar.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dpfast.errors import InputError, UnreadableError, first_line
from dpfast.files import reading, there
from dpfast.pool.codecs import CODECS
from dpfast.pool.record import RECORD, as_dict, from_dicts, ranges
from dpfast.pool.tars import BLOCK, check_member, read_tar
from dpfast.textfiles import read_whole_json

MANIFEST = "manifest.json"
# NumPy parses a header as Python; CPython 3.11 may fail where two threads parse at once ("AST
# constructor recursion depth mismatch")
ONE_PARSER = threading.Lock()
FORMAT = "dpfast-pool"
VERSION = 2
WRITE_BYTES = 1 << 20
SUFFIXES = ("npy", "png", "jpg", "jpeg")  # of payloads; ours are the first three


class DamagedPoolError(InputError):
    """A folder that is not a saved pool, or one that cannot be read at all."""


class LostSamplesWarning(UserWarning):
    """A warning that a shard did not match its checksum and was quarantined."""


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest names it. ``ids``: inclusive runs of sample ids, in their order."""

    name: str
    samples: int
    bytes: int
    sha256: str
    columns_sha256: str
    ids: list[list[int]]

    def intact(self) -> bool:
        """Returns True if the values are such as a manifest has, and the ids as many as the
        samples.
        """
        return (
            all(isinstance(text, str) for text in (self.name, self.sha256, self.columns_sha256))
            and _is_number(self.samples)
            and _is_number(self.bytes)
            and isinstance(self.ids, list)
            and all(isinstance(run, list) and len(run) == 2 for run in self.ids)
            and all(type(end) is int for run in self.ids for end in run)
            and sum(last - first + 1 for first, last in self.ids) == self.samples
        )

    @property
    def columns(self) -> str:
        return self.name.removesuffix(".tar") + ".columns.npy"

    @cached_property
    def line(self) -> str:
        """The shard as JSON, kept: a manifest is written anew for every shard."""
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Manifest:
    """The promise of a folder of shards. suffix: of the payloads' files; classes: names of the
    labels, where they are known.
    """

    codec: str
    shape: list[int] | None  # of a payload; None for JPEG
    suffix: str
    classes: list[str] | None = None
    shards: list[Shard] = field(default_factory=list)
    quarantined: list[Shard] = field(default_factory=list)

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def next_name(self) -> str:
        """Returns the name of the next shard; those of quarantined shards are not used again."""
        # the shards' numbers rise
        numbers = [int(s.name[6:-4]) for s in (*self.shards[-1:], *self.quarantined)]
        return f"shard-{max(numbers, default=-1) + 1:06d}.tar"

    def _check(self, path: Path) -> None:
        """Raises ``DamagedPoolError`` for values that no manifest has."""
        shape, classes = self.shape, self.classes
        for name, right in (
            ("codec", self.codec in CODECS),
            ("suffix", self.suffix in SUFFIXES),
            ("shape", shape is None or (isinstance(shape, list) and all(map(_is_number, shape)))),
            (
                "classes",
                classes is None
                or (isinstance(classes, list) and all(isinstance(each, str) for each in classes)),
            ),
        ):
            if not right:
                raise DamagedPoolError(f"{path} has {name} = {getattr(self, name)!r}")
        for shard in (*self.shards, *self.quarantined):
            if not shard.intact():
                raise DamagedPoolError(f"{path}: what it says of {shard.name!r} is damaged")

    def write(self, folder: Path) -> None:
        """Replaces the manifest of ``folder`` at once."""
        head = {"format": FORMAT, "version": VERSION}
        head |= {name: getattr(self, name) for name in ("codec", "shape", "suffix", "classes")}
        lists = (
            f'"{name}": [\n{_lines(getattr(self, name))}]' for name in ("shards", "quarantined")
        )
        with durable(folder, MANIFEST) as file:
            file.write(f"{json.dumps(head)[:-1]},\n{', '.join(lists)}}}\n".encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ``DamagedPoolError`` when ``folder`` holds no manifest of this format, and
        ``UnreadableError`` for one that may not be read.
        """
        table = read_whole_json(folder / MANIFEST)
        if table is None:
            found = there(folder / MANIFEST)
            raise DamagedPoolError(
                f"{folder / MANIFEST} cannot be read as JSON"
                if found
                else f"{str(folder)!r} holds no saved pool: it has no {MANIFEST}"
            )
        try:
            if table.pop("format") != FORMAT or table.pop("version") != VERSION:
                raise DamagedPoolError(f"{folder / MANIFEST} is not version {VERSION} of {FORMAT}")
            for key in ("shards", "quarantined"):
                if not isinstance(table[key], list):
                    raise DamagedPoolError(f"{folder / MANIFEST}: its {key} are no list")
                table[key] = [Shard(**shard) for shard in table[key]]
            manifest = cls(**table)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedPoolError(f"{folder / MANIFEST} cannot be read: {error!r}") from None
        manifest._check(folder / MANIFEST)
        for shard in (*manifest.shards, *manifest.quarantined):
            check_member(shard.name, folder / MANIFEST)
            if "/" in shard.name or not shard.name[6:-4].isdecimal():
                raise DamagedPoolError(f"{folder / MANIFEST} names a shard {shard.name!r}")
        names = [shard.name for shard in manifest.shards]
        if len(set(names)) < len(names):
            raise DamagedPoolError(f"{folder / MANIFEST} names a shard twice")
        return manifest


def _is_number(value: object) -> bool:
    return type(value) is int and value >= 0


def _lines(shards: Sequence[Shard]) -> str:
    return ",\n".join(shard.line for shard in shards)


class durable:
    """Opens a file that appears under its name only when it is complete and on the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / name
        self.temporary = folder / f".{name}.tmp"

    def __enter__(self) -> io.BufferedWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.temporary.open("wb")
        return self.file

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                self.temporary.replace(self.path)
                sync_folder(self.folder)
        finally:
            # what a full disk has left in the buffer; that has been raised before
            with contextlib.suppress(OSError):
                self.file.close()
            self.temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last, not only the files' contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tar_header(name: str, size: int) -> bytes:
    """Returns the ustar header of a regular file, without owner or time, so that equal samples give
    equal shards.
    """
    header = bytearray(BLOCK)
    for start, text in (
        (0, name),
        (100, "0000644"),  # mode
        (108, "0000000"),  # user
        (116, "0000000"),  # group
        (124, f"{size:011o}"),
        (136, "0" * 11),  # time
        (148, " " * 8),  # the checksum counts itself as blanks
        (156, "0"),  # a regular file
        (257, "ustar"),
        (263, "00"),
    ):
        header[start : start + len(text)] = text.encode()
    header[148:155] = f"{sum(header):06o}\0".encode()
    return bytes(header)


def write_shard(
    folder: Path,
    name: str,
    records: np.ndarray,
    payloads: Iterable[bytes | memoryview],
    suffix: str,
    header: bytes = b"",
) -> Shard:
    """Writes a shard and its columns.

    records: (B,) ``RECORD``; their offset and length are written as those of the payloads in the
    tar. header: stands before every payload in its file; offsets point behind it. Raises
    ``OSError`` where the disk is full.
    """
    records = records.copy()
    digest = hashlib.sha256()
    position = 0
    pending = bytearray()
    with durable(folder, name) as file:
        for row, payload in enumerate(payloads):
            key = f"{name[6:-4]}-{row:06d}"
            length = len(header) + len(payload)
            records["offset"][row] = position + len(pending) + BLOCK + len(header)
            records["length"][row] = len(payload)
            pending += tar_header(f"{key}.{suffix}", length) + header
            pending += payload
            pending += b"\0" * (-length % BLOCK)
            for kind, text in (
                ("cls", str(records["label"][row])),
                ("json", json.dumps(as_dict(records[row]))),
            ):
                pending += (
                    tar_header(f"{key}.{kind}", len(text))
                    + text.encode()
                    + b"\0" * (-len(text) % BLOCK)
                )
            if len(pending) > WRITE_BYTES:
                file.write(pending)
                digest.update(pending)
                position = position + len(pending)
                pending = bytearray()
        pending += b"\0" * (2 * BLOCK)
        file.write(pending)
        digest.update(pending)
    columns = io.BytesIO()
    np.save(columns, records)
    shard = Shard(
        name=name,
        samples=len(records),
        bytes=position + len(pending),
        sha256=digest.hexdigest(),
        columns_sha256=hashlib.sha256(columns.getbuffer()).hexdigest(),
        ids=ranges(records["sample_id"]),
    )
    with durable(folder, shard.columns) as file:
        file.write(columns.getbuffer())
    return shard


@dataclass(frozen=True)
class Loaded:
    """A verified shard: its records, whose offsets point into ``data``, the mapped tar."""

    shard: Shard
    records: np.ndarray
    data: np.ndarray


def verify(folder: Path, shard: Shard) -> Loaded | str:
    """Returns the shard, or in words what is wrong with it. A damaged columns file is replaced from
    the tar. Raises ``UnreadableError`` for files that may not be read, which are not damaged.
    """
    return opened(folder, shard, checksum=True)


def opened(folder: Path, shard: Shard, *, checksum: bool = False) -> Loaded | str:
    """Returns ``verify``, which reads all of the tar for its ``checksum``; without it the columns
    alone, unless they are damaged.
    """
    try:
        with reading(folder / shard.name):
            data = np.memmap(folder / shard.name, np.uint8, "r")
    except UnreadableError:
        raise
    except (OSError, ValueError) as error:
        return str(error)
    if len(data) != shard.bytes:
        return f"{len(data)} bytes, the manifest says {shard.bytes}"
    if checksum and hashlib.sha256(data.data).hexdigest() != shard.sha256:
        return "its checksum differs from the manifest's"
    records = read_columns(folder, shard)
    if records is None:
        if not checksum:
            return verify(folder, shard)
        records = _records_of(folder / shard.name)
    if records.dtype != RECORD or len(records) != shard.samples:
        return f"{len(records)} samples, the manifest says {shard.samples}"
    if len(records) and (
        records["offset"].min() < 0 or (records["offset"] + records["length"]).max() > len(data)
    ):
        return "a payload lies outside it"
    return Loaded(shard, records, data)


def read_columns(folder: Path, shard: Shard) -> np.ndarray | None:
    """Returns the array of a shard's columns file; None where there is none, or a damaged one.
    Raises ``UnreadableError`` for one that may not be read.
    """
    try:
        with reading(folder / shard.columns):
            columns = (folder / shard.columns).read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        return None
    if hashlib.sha256(columns).hexdigest() != shard.columns_sha256:
        return None
    with ONE_PARSER:
        found: np.ndarray = np.load(io.BytesIO(columns))
    return found


def _records_of(path: Path) -> np.ndarray:
    """Returns the columns and payload positions of a shard, from its own members."""
    rows = []
    spans = []
    for sample in read_tar(path):
        rows.append(json.loads(sample.read("json")))
        suffix = next(s for s in SUFFIXES if s in sample.members)
        start, length = sample.members[suffix]
        header = _npy_header(sample.read(suffix))[1] if suffix == "npy" else 0
        spans.append((start + header, length - header))
    records = from_dicts(rows)
    records["offset"], records["length"] = np.array(spans, np.int64).reshape(-1, 2).T
    return records


def npy_array(data: bytes, where: str) -> np.ndarray:
    """Returns the array of an .npy file's bytes, uint8 or float16 (C, H, W).

    Raises ``InputError`` that begins with ``where`` for another, and for a torn one.
    """
    try:
        (shape, fortran, dtype), start = _npy_header(data)
    except Exception as error:  # NumPy raises what tokenize and ast raise of a header
        raise InputError(f"{where}: {first_line(error)}") from None
    if fortran or dtype not in (np.uint8, np.float16) or len(shape) != 3:
        raise InputError(
            f"{where}: an array of {dtype} {shape}, expected uint8 or float16 (C, H, W) in C order"
        )
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{where}: {len(data) - start} bytes of an array of {dtype} {shape}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _npy_header(data: bytes) -> tuple[tuple[tuple[int, ...], bool, np.dtype], int]:
    """Returns (shape, Fortran order, dtype) of an .npy file, and where its data begin."""
    buffer = io.BytesIO(data)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise InputError("an .npy file of a version that is not 1.0")
    with ONE_PARSER:
        return np.lib.format.read_array_header_1_0(buffer), buffer.tell()


def load_shards(
    folder: Path, manifest: Manifest, *, threads: int = 2, beat: Callable[[], None] = lambda: None
) -> tuple[Manifest, Iterator[Loaded]]:
    """Returns the manifest of what is intact, and the intact shards in their order, verified
    ``threads`` at a time.

    A shard that is damaged or missing is moved to ``quarantine/``, the manifest on the disk is
    replaced, and a ``LostSamplesWarning`` names the shard and the ids of its samples, at this and
    at every later opening. ``beat`` is called after each shard.
    """
    checked = []
    with ThreadPoolExecutor(threads, "dpfast-verify") as executor:
        for result in executor.map(lambda shard: verify(folder, shard), manifest.shards):
            checked.append(result)
            beat()
    good = []
    bad = list(manifest.quarantined)
    reasons = dict.fromkeys((shard.name for shard in bad), "quarantined before")
    for shard, result in zip(manifest.shards, checked, strict=True):
        if isinstance(result, Loaded):
            good.append(result)
            continue
        bad.append(shard)
        reasons[shard.name] = result
        (folder / "quarantine").mkdir(exist_ok=True)
        for name in (shard.name, shard.columns):
            if (folder / name).exists():
                (folder / name).replace(folder / "quarantine" / name)
    intact = replace(manifest, shards=[loaded.shard for loaded in good], quarantined=bad)
    if bad:
        if len(bad) != len(manifest.quarantined):
            intact.write(folder)
        lost = "; ".join(f"{s.name}: ids {describe(s.ids)} ({reasons[s.name]})" for s in bad)
        count = sum(shard.samples for shard in bad)
        warnings.warn(
            f"{folder}: {count} samples are lost. {lost}", LostSamplesWarning, stacklevel=4
        )
    return intact, iter(good)


def describe(runs: Sequence[Sequence[int]]) -> str:
    """Returns runs of ids in words: "0-2, 7"."""
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
