"""The files of a run, without a disk of its size: checkpoints keep their shapes, samples are few
and real.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from dpfast.practice import background, checkpoint, saved_samples
from dpfast.rehearsal.device import scripted

DIGEST = "rehearsed"


class RehearsedDisk:
    """Takes the place of checkpoints' copies and files.

    bytes: of the newest checkpoint; copied: bytes that the loop's thread copied to the host for it;
    written: bytes that the loop's thread wrote itself, instead of the background.
    """

    def __init__(self) -> None:
        self.bytes = self.copied = self.written = 0
        self._files: dict[Path, dict[str, Tensor]] = {}

    def values(self) -> list[tuple[Any, str, Any]]:
        """Returns the stand-ins of the disk, as ``dpfast.rehearsal.standins.put`` takes them."""
        return [
            (background.HostCopy, "take", lambda _, tensors: self._take(tensors)),
            (checkpoint, "save_weights", self._save),
            (checkpoint, "load_file", lambda path: self._files[Path(path)]),
            (checkpoint, "_sha256", lambda _: DIGEST),
            # the other ranks have saved what they hold
            (saved_samples, "_promised", lambda *_: 1 << 62),
        ]

    def _take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self.copied = sum(value.nbytes for value in tensors.values() if value.is_meta)
        return {name: _on_the_host(value) for name, value in tensors.items()}

    def _save(self, tensors: dict[str, Tensor], path: Path) -> str:
        self.bytes = sum(value.numel() * value.itemsize for value in tensors.values())
        if threading.current_thread() is threading.main_thread():
            self.written = self.bytes
        self._files[path] = tensors
        path.write_bytes(b"")
        return DIGEST


def _on_the_host(value: Tensor) -> Tensor:
    return scripted(value.shape, value.dtype) if value.is_meta else value.clone()
