"""The pool that takes in the samples of other people's files: each of them is checked, not the
first alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dpfast.data.jpeg import START, read_header
from dpfast.errors import InputError
from dpfast.labels import shortened
from dpfast.pool import codecs
from dpfast.pool.pool import SamplePool
from dpfast.pool.record import COLUMNS, from_dicts

OURS = frozenset(COLUMNS)
BATCH = 1000  # samples in memory at a time


class Intake:
    """A pool that grows; its codec is that of the first sample. JPEG files stay files, all other
    images become pixels.

    done: called with the number of samples of each part that was taken in.

    Attributes:
        pool: the samples.
        classes: names of their labels, where they are known.
    """

    def __init__(self, done: Callable[[int], object] = lambda count: None) -> None:
        self.pool = SamplePool()
        self._done = done
        self.classes: list[str] | None = None
        self._named_by = ""

    def name_classes(self, classes: object, where: str) -> list[str] | None:
        """Takes the names of the labels as the file ``where`` has them, None for none, and returns
        them. Raises ``InputError`` for what are no names, and for others than those before.
        """
        if classes is not None and not (
            isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
        ):
            raise InputError(f"{where}: the names of its classes are {shortened(classes)}")
        if self._named_by and classes != self.classes:
            raise InputError(f"{where} names other classes than {self._named_by}")
        self.classes, self._named_by = classes, where
        return classes

    def image_files(
        self, names: Sequence[str], files: Sequence[bytes], rows: Sequence[dict[str, Any]]
    ) -> None:
        """Appends images as files. names: what to call them in messages; rows: as of ``records``.

        Raises ``InputError`` with the name of one that is no image, or not like those before.
        """
        jpeg = [data.startswith(START) for data in files]
        if not len(self.pool):
            self.pool = SamplePool("jpeg" if jpeg[0] else "pixels")
        for name, is_jpeg in zip(names, jpeg, strict=True):
            if is_jpeg != (self.pool.codec == "jpeg"):
                kinds = ("a JPEG file", "none") if is_jpeg else ("no JPEG file", "JPEG files")
                raise InputError(f"{name} is {kinds[0]}, the samples before it are {kinds[1]}")
        records = self._records(names, rows)
        if self.pool.codec == "jpeg":
            for name, data in zip(names, files, strict=True):
                read_header(data, name)  # the pool's own check knows no names
            self.pool.append_records(files, records)
            self._done(len(files))
            return
        images: list[np.ndarray] = []
        for name, data in zip(names, files, strict=True):
            images.append(codecs.from_image_file(data, name))
            expected = self.pool.shape or images[0].shape
            if images[-1].shape != expected:
                raise InputError(
                    f"{name} is of shape {images[-1].shape}, the images before it are {expected}"
                )
        self.pool.append_records(torch.from_numpy(np.stack(images)), records)
        self._done(len(images))

    def arrays(
        self, names: Sequence[str], arrays: Sequence[np.ndarray], rows: Sequence[dict[str, Any]]
    ) -> None:
        """Appends pixels (C, H, W) uint8 or latents (c, h, w) float16; else as ``image_files``."""
        codecs_of = ["pixels" if array.dtype == np.uint8 else "latents" for array in arrays]
        if not len(self.pool):
            self.pool = SamplePool(codecs_of[0])
        before = self.pool.codec, self.pool.shape or arrays[0].shape
        for name, array, codec in zip(names, arrays, codecs_of, strict=True):
            if (codec, array.shape) != before:
                raise InputError(
                    f"{name} holds {codec} of shape {array.shape}, the samples before it are "
                    f"{before[0]} of shape {before[1]}"
                )
        self.pool.append_records(torch.from_numpy(np.stack(arrays)), self._records(names, rows))
        self._done(len(arrays))

    def _records(self, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """Returns the records of samples. Of a row that has all columns of dpfast all are read; of
        another the "label" alone, and its id is its place in the pool: a "seed" or "round" of other
        people is none of ours.
        """
        first = len(self.pool)
        return from_dicts(
            [
                row
                if row.keys() >= OURS
                else {"sample_id": first + place, "label": row.get("label")}
                for place, row in enumerate(rows)
            ],
            names,
        )
