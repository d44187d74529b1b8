"""Checkpoints of a loop: a kill at any moment is harmless, and a damaged one costs the way back to
the one before.

    checkpoint-000012.safetensors          the tensors of every component, as "component/name"
    checkpoint-000012.json                 format version, step, iterations, ranks, SHA-256 of the
                                           tensors, what else the components keep, and the SHA-256
                                           of these
    checkpoint-000013-round-02.json        kept for good: the end of round 2, right before the next
                                           addition
    checkpoint-000017-stable.json          kept: the last one before the cool-down, from which a run
                                           can be made longer

The components are the parts of the loop that keep their own state (``Loop.components``). The JSON
is written last: a checkpoint without one does not exist. Both appear under their names complete and
synced.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpfast.errors import InputError, UnreadableError
from dpfast.files import check_readable, listed
from dpfast.pool.shards import durable
from dpfast.textfiles import read_json, read_whole_json

VERSION = 6
OWN = "record_sha256"  # of the JSON's other values but the version; older checkpoints have none
STABLE = "stable"
WRITE_BYTES = 16 << 20
DTYPES = {  # and their names in a safetensors file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamagedCheckpointWarning(UserWarning):
    """A warning that a checkpoint does not match its record and was passed over."""


class VersionError(InputError):
    """An error for a checkpoint of another version of the format."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a loop at a moment.

    step: optimiser steps taken of ``iterations``; ranks: how many of them hold the samples;
    components: what the ``state_dict`` of each part of the loop gave, tensors and values for JSON.
    path: of the JSON file that it was read from.
    """

    step: int
    iterations: int
    ranks: int
    components: dict[str, dict[str, Any]]
    path: Path | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all components, as "component/name"."""
        return {
            f"{component}/{name}": value
            for component, state in self.components.items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """The values that the components keep beside tensors, for JSON."""
        return {
            component: {k: v for k, v in state.items() if not isinstance(v, Tensor)}
            for component, state in self.components.items()
        }

    def with_tensors(self, tensors: dict[str, Tensor]) -> Checkpoint:
        """Returns the checkpoint with these tensors, as "component/name", beside its values."""
        components = self.values
        for name, value in tensors.items():
            component, _, key = name.partition("/")
            components[component][key] = value
        return replace(self, components=components)


def of_round(number: int) -> str:
    """Returns the label of the checkpoint of a round's end."""
    return f"round-{number:02d}"


def save(folder: Path, taken: Checkpoint, *, keep: int, label: str | None = None) -> Path:
    """Writes a checkpoint and removes the oldest ones beyond ``keep``; those with a ``label`` stay.

    label: ``of_round`` or ``STABLE``, of which the newest alone stays. Raises ``OSError``, also for
    a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = paths(folder)
    number = _number(before[-1]) if before else 0
    path = folder / f"checkpoint-{number:06d}{'' if label is None else f'-{label}'}.json"
    record = {
        "version": VERSION,
        "step": taken.step,
        "iterations": taken.iterations,
        "ranks": taken.ranks,
        "sha256": save_weights(taken.tensors, path.with_suffix(".safetensors")),
        "components": taken.values,
    }
    record[OWN] = _digest(record)
    with durable(folder, path.name) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
    every = (*before, path)
    passing = [p for p in every if len(p.stem.split("-")) == 2]
    stable = [p for p in every if p.stem.endswith(f"-{STABLE}")]
    for old in (*passing[:-keep], *stable[:-1]):
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    return path


def save_weights(tensors: dict[str, Tensor], path: Path) -> str:
    """Returns a safetensors file that appears under its name complete and synced; its SHA-256.
    Raises ``OSError``.
    """
    digest = hashlib.sha256()
    with durable(path.parent, path.name) as file:
        for piece in file_pieces(tensors):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def file_pieces(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """Yields the bytes of a safetensors file, a piece at a time, each read from where its tensor
    lies.

    safetensors' own function copies everything first, and a checksum would read it all again.
    Raises ``InputError`` for a dtype that the file does not know.
    """
    # so that all are aligned
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header = {}
    end = 0
    for name, value in ordered:
        if value.dtype not in DTYPES:
            raise InputError(f"{name} is of {value.dtype}, which no file of weights takes")
        start = end
        end += value.numel() * value.itemsize
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start_of_file = memoryview(len(text).to_bytes(8, "little") + text)
    for part in itertools.chain([start_of_file], (_bytes(value) for _, value in ordered)):
        for first in range(0, len(part), WRITE_BYTES):
            yield part[first : first + WRITE_BYTES]


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def paths(folder: Path) -> list[Path]:
    """Returns the JSON files of a folder's checkpoints, oldest first; files of other names, as
    copies have, are passed over.
    """
    return sorted(filter(_number, listed(folder, "checkpoint-*.json")), key=_number)


def _number(path: Path) -> int:
    """Returns the number of a checkpoint, from 1; 0: the file is none."""
    found = re.fullmatch(rf"checkpoint-([0-9]{{6,}})(-round-[0-9]+|-{STABLE})?\.json", path.name)
    return int(found[1]) + 1 if found else 0


def ranks_of(folder: Path) -> set[int]:
    """Returns the numbers of ranks that hold the samples of a folder's checkpoints, of those whose
    JSON can be read.
    """
    records = [read_whole_json(path) for path in paths(folder)]
    ranks = [record.get("ranks") for record in records if isinstance(record, dict)]
    return {count for count in ranks if isinstance(count, int)}


def at_round(folder: Path, round: int) -> Path | None:
    """Returns the kept checkpoint of the end of a round, the newest where there are several; None
    where there is none.
    """
    found = [p for p in paths(folder) if p.stem.endswith(f"-{of_round(round)}")]
    return found[-1] if found else None


def rounds(folder: Path) -> list[int]:
    """Returns the rounds whose ends are kept, in their order."""
    names = (re.fullmatch(r"checkpoint-[0-9]+-round-([0-9]+)", path.stem) for path in paths(folder))
    return sorted({int(name[1]) for name in names if name})


def step_of(path: Path) -> int | None:
    """Returns the step of a checkpoint; None where its JSON cannot be read."""
    record = read_whole_json(path)
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def stable(folder: Path) -> Path | None:
    """Returns the kept checkpoint before the cool-down; None where there is none yet."""
    found = [p for p in paths(folder) if p.stem.endswith(f"-{STABLE}")]
    return found[-1] if found else None


def _digest(record: dict[str, Any]) -> str:
    """Returns the SHA-256 of a record's values, the same before and after they were JSON."""
    own = {name: value for name, value in record.items() if name not in (OWN, "version")}
    values = json.loads(json.dumps(own))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _altered(record: dict[str, Any]) -> bool:
    return OWN in record and record[OWN] != _digest(record)


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint. Raises ``VersionError`` for one of another format, ``UnreadableError``
    where the file system lets this user not read it, and ``InputError`` that says what is wrong
    with a damaged one.
    """
    try:
        record = read_json(path)
        version = record["version"]
        if _altered(record) or not isinstance(version, int):
            raise InputError("its values differ from their recorded checksum")
        if version == VERSION:
            weights = path.with_suffix(".safetensors")
            check_readable(weights)
            if _sha256(weights) != record["sha256"]:
                raise InputError(f"the checksum of {weights.name} differs from the recorded one")
            names = ("step", "iterations", "ranks", "components")
            taken = Checkpoint(**{name: record[name] for name in names}, path=path)
            return taken.with_tensors(load_file(weights))
    except UnreadableError:
        raise
    except KeyError as error:
        raise InputError(f"{path} is no intact checkpoint: it lacks {error}") from None
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{path} is no intact checkpoint: {error}") from error
    raise _of_version(path, version)


def check_version(folder: Path) -> None:
    """Raises ``VersionError`` where the newest checkpoint of a folder is of another format, before
    any work; a damaged one is left to ``latest``.
    """
    for path in paths(folder)[-1:]:
        record = read_whole_json(path)
        version = record.get("version") if isinstance(record, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise _of_version(path, version)


def _of_version(path: Path, version: object) -> VersionError:
    return VersionError(
        f"{path} is a checkpoint of version {version} of the format, and this dpfast reads version "
        f"{VERSION}: end the run with the dpfast that began it, or begin it anew"
    )


def latest(folder: Path) -> Checkpoint | None:
    """Returns the newest intact checkpoint; None where there has never been one.

    A damaged one is named in a ``DamagedCheckpointWarning`` and the one before is taken. Raises
    ``VersionError`` for one of another format, ``UnreadableError`` for one that may not be read,
    and ``InputError`` when none is intact.
    """
    found = paths(folder)
    for path in reversed(found):
        try:
            return load(path)
        except (VersionError, UnreadableError):
            raise
        except InputError as error:
            warnings.warn(
                f"{error}; the one before is used", DamagedCheckpointWarning, stacklevel=2
            )
    if found:
        raise InputError(
            f"resume: none of the {len(found)} checkpoints in {str(folder)!r} is intact"
        )
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()
