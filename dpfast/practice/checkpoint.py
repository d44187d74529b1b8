"""Checkpoints of a loop: a kill at any moment is harmless, and a damaged one costs the way back to the one before.

    checkpoint-000012.safetensors          all tensors
    checkpoint-000012.json                 format version, step, SHA-256 of the tensors, and the rest of the state
    checkpoint-000013-round-02.json        kept for good: the end of round 2, right before the next addition

The JSON is written last: a checkpoint without one does not exist. Both appear under their names complete and synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpfast.config import RecipeError
from dpfast.pool.shards import durable, sync_folder

VERSION = 5


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint does not match its record and was passed over."""


@dataclass(frozen=True)
class Checkpoint:
    """path: of the JSON; step: optimiser steps; tensors, state: what ``save`` was given."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int, round: int | None = None
) -> Path:
    """Writes a checkpoint and removes the oldest ones beyond ``keep``; those of the end of a ``round`` stay."""
    folder.mkdir(parents=True, exist_ok=True)
    before = paths(folder)
    number = int(before[-1].name.split("-")[1].removesuffix(".json")) + 1 if before else 0
    path = folder / f"checkpoint-{number:06d}{'' if round is None else f'-round-{round:02d}'}.json"
    weights = path.with_suffix(".safetensors")
    save_weights(tensors, weights)
    record = {"version": VERSION, "step": step, "sha256": _sha256(weights), "state": state}
    with durable(folder, path.name) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
    passing = [p for p in (*before, path) if "-round-" not in p.name]
    for old in passing[:-keep]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    return path


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file that appears under its name complete and synced. Raises ``OSError``, also for a full disk."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def paths(folder: Path) -> list[Path]:
    """The JSON files of a folder's checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*.json"))


def states(folder: Path) -> Iterator[dict[str, Any]]:
    """What ``save`` was given as ``state``, of every checkpoint whose JSON can be read."""
    for path in paths(folder):
        with contextlib.suppress(OSError, ValueError, KeyError):
            yield json.loads(path.read_text())["state"]


def at_round(folder: Path, round: int) -> Path | None:
    """The kept checkpoint of the end of a round, the newest where there are several; None where there is none."""
    found = [p for p in paths(folder) if p.stem.endswith(f"-round-{round:02d}")]
    return found[-1] if found else None


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint. Raises ``ValueError`` that says what is wrong with it."""
    try:
        record = json.loads(path.read_text())
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']} of the format, expected {VERSION}")
        weights = path.with_suffix(".safetensors")
        if _sha256(weights) != record["sha256"]:
            raise ValueError(f"the checksum of {weights.name} differs from the recorded one")
        return Checkpoint(path, record["step"], load_file(weights), record["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path} is no intact checkpoint: {error}") from error


def latest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint; None where there has never been one.

    A damaged one is named in a ``DamagedCheckpointWarning`` and the one before is taken. Raises ``RecipeError`` when
    none is intact.
    """
    found = paths(folder)
    for path in reversed(found):
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"{error}; the one before is used", DamagedCheckpointWarning, stacklevel=2)
    if found:
        raise RecipeError(f"resume: none of the {len(found)} checkpoints in {str(folder)!r} is intact")
    return None


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{key}": value for key, value in tensors.items()}


def part(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix``, without it."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()
