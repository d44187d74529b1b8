"""Samples that are held while a round is being chosen, so that a kill does not lose them.

    held_prune/step-000021234/rank-003-of-008/slots         a record for each sample, its own place
                                                            used again when it is dropped
                                              kept-00000512.safetensors
                                                            which samples lie where after so many
                                                            turns, with their checksums

Every rank holds the samples that it has made. They lie on the disk alone where a run saves its
samples, else in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dpfast.errors import InputError, SaveWarning
from dpfast.files import numbered
from dpfast.pool.shards import durable

KEPT = "kept-{:08d}.safetensors"
COLUMNS = ("number", "slot", "score", "check")


class HeldSamples:
    """Records of bytes by number, each of ``width`` bytes; a file in ``folder``, or memory (None).

    What a disk refuses stays in memory, with a ``SaveWarning``.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.width = 0
        self.about: dict[str, Any] = {}  # kept with what is saved
        # number -> slot of the file or the record itself, score, checksum
        self._held: dict[int, tuple[int | Tensor, float, int]] = {}
        self._file: BinaryIO | None = None
        self._slots = 0
        self._free: list[int] = []
        # Slots that were dropped since the newest saving, and before it. Another rank may have the
        # saving before alone: until the next one, nothing that it speaks of is written over.
        self._dropped: list[int] = []
        self._parting: list[int] = []
        self._refused = False

    def __len__(self) -> int:
        return len(self._held)

    def put(self, numbers: Sequence[int], scores: Sequence[float], records: Tensor) -> None:
        """Holds records, (n, width) uint8 on the CPU."""
        self.width = records.shape[1]
        for number, score, record in zip(numbers, scores, records, strict=True):
            place = record.clone() if self.folder is None else self._write(record)
            self._held[number] = place, score, zlib.crc32(record.numpy())

    def drop(self, numbers: Iterable[int]) -> None:
        """Holds those of ``numbers`` no more that it holds."""
        for number in numbers:
            place, *_ = self._held.pop(number, (None,))
            if isinstance(place, int):
                self._dropped.append(place)

    def records(self, numbers: Sequence[int]) -> Tensor:
        """Returns (n, width) uint8 of samples that are held. Raises ``InputError`` for a damaged
        one.
        """
        rows = torch.empty(len(numbers), self.width, dtype=torch.uint8)
        for row, number in zip(rows, numbers, strict=True):
            row.copy_(self._record(number))
            if not self._intact(number, row):
                raise InputError(
                    f"{str(self.folder)!r} is damaged: the checksum of candidate {number} differs "
                    "from the recorded one; remove the folder and go on with --resume"
                )
        return rows

    def save(self, turn: int) -> None:
        """Makes what is held after ``turn`` turns last, if the disk takes it. All ranks have saved
        the turn before by then.
        """
        if self.folder is None:
            return
        for number, (place, score, check) in self._held.items():
            if isinstance(place, Tensor):  # the disk has refused it before
                self._held[number] = self._write(place), score, check
        places, scores, checks = zip(*self._held.values(), strict=True) if self._held else ((),) * 3
        if any(isinstance(place, Tensor) for place in places):
            return
        columns = {
            "number": torch.tensor(list(self._held), dtype=torch.int64),
            "slot": torch.tensor(places, dtype=torch.int64),
            "score": torch.tensor(scores, dtype=torch.float32),
            "check": torch.tensor(checks, dtype=torch.int64),
        }
        about = json.dumps({**self.about, "width": self.width, "turn": turn})
        described = {"about": about, "checksum": str(_checksum(about, columns))}
        try:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
            with durable(self.folder, KEPT.format(turn)) as file:
                file.write(save(columns, described))
            for old in self.turns()[:-2]:
                self._kept(old).unlink()
        except OSError as error:
            self._warn(error)
            return
        self._free += self._parting
        self._parting, self._dropped = self._dropped, []
        self._refused = False

    def turns(self) -> list[int]:
        """Returns after how many turns something was saved, rising."""
        if self.folder is None:
            return []
        return list(numbered(self.folder, KEPT))

    def load(self, turn: int) -> tuple[Tensor, Tensor]:
        """Holds what was saved after ``turn`` turns; gives numbers (n,) int64 and scores (n,)
        float32.

        Raises ``InputError`` where that cannot be read, or is not what was saved then.
        """
        assert self.folder is not None
        path = self._kept(turn)
        try:
            with safe_open(path, "pt") as file:
                described = file.metadata() or {}
                columns = {name: file.get_tensor(name) for name in COLUMNS}
            written = described.get("about", "")
            # before anything that it says is believed
            if described.get("checksum") != str(_checksum(written, columns)):
                raise InputError(f"{path} is damaged: its checksum differs from the recorded one")
            about = json.loads(written)
            if about.pop("turn") != turn:
                raise InputError(f"{path} was saved under another name")
            numbers, slots, scores, checks = (column.tolist() for column in columns.values())
            self.width = about.pop("width")
            self.about = about
            values = zip(slots, scores, checks, strict=True)
            self._held = dict(zip(numbers, values, strict=True))
            self._slots = max(slots, default=-1) + 1
            self._free = sorted(set(range(self._slots)) - set(slots))
            for number in numbers:
                if not self._intact(number, self._record(number)):
                    raise InputError(f"{path.parent / 'slots'} is damaged at candidate {number}")
            for other in self.turns():
                if other != turn:
                    self._kept(other).unlink()
        except InputError:
            raise
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        return columns["number"], columns["score"]

    def clear(self) -> None:
        """Forgets everything, and removes what was saved."""
        self.close()
        self._held, self._slots = {}, 0
        self._free, self._dropped, self._parting = [], [], []
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _kept(self, turn: int) -> Path:
        assert self.folder is not None
        return self.folder / KEPT.format(turn)

    def _record(self, number: int) -> Tensor:
        place = self._held[number][0]
        return place if isinstance(place, Tensor) else self._read(place)

    def _intact(self, number: int, record: Tensor) -> bool:
        return zlib.crc32(record.numpy().data) == self._held[number][2]

    def _opened(self) -> BinaryIO:
        if self._file is None:
            assert self.folder is not None
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "slots"
            path.touch()
            self._file = path.open("r+b")
        return self._file

    def _write(self, record: Tensor) -> int | Tensor:
        """Returns the slot that has a record now; the record where the disk refuses it."""
        slot = self._free[-1] if self._free else self._slots
        try:
            file = self._opened()
            file.seek(slot * self.width)
            file.write(record.numpy().data)
            file.flush()
        except OSError as error:
            self._warn(error)
            self.close()
            return record.clone()
        if self._free:
            self._free.pop()
        else:
            self._slots += 1
        return slot

    def _read(self, slot: int) -> Tensor:
        file = self._opened()
        file.seek(slot * self.width)
        data = file.read(self.width)
        if len(data) != self.width:
            return torch.zeros(self.width, dtype=torch.uint8)  # its checksum will differ
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _warn(self, error: OSError) -> None:
        if not self._refused:
            warnings.warn(
                f"candidates were not written in {str(self.folder)!r}: {error}; the run goes on in "
                "memory",
                SaveWarning,
                stacklevel=2,
            )
        self._refused = True


def _checksum(about: str, columns: dict[str, Tensor]) -> int:
    """Returns the checksum of all that a file of kept samples says, dtypes and shapes too."""
    found = zlib.crc32(about.encode())
    for name, column in columns.items():
        said = f"{name} {column.dtype} {tuple(column.shape)}"
        found = zlib.crc32(column.numpy().data, zlib.crc32(said.encode(), found))
    return found
