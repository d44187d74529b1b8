"""Real images to train on, in the order of the run's seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpfast.data import fashion
from dpfast.data.class_folders import imagenet_ids
from dpfast.data.folders import fit_file, fit_pixels, open_folder
from dpfast.data.real import check_training
from dpfast.errors import InputError
from dpfast.files import reading
from dpfast.hardware.cpus import cpus
from dpfast.ops.permutation import permutation
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.codecs import to_jpeg
from dpfast.pool.record import RECORD
from dpfast.samples import SampleBatch
from dpfast.sources.existing import chosen
from dpfast.sources.labels import LabelOrder

STREAM = 0x7265616C  # of the key of the order
Read = Callable[[int], tuple[Tensor, bytes | None]]  # an image, and its file where that stays


class RealImages:
    """At most ``most`` real images, the classes in turn (``chosen``), of a class in an order by
    ``seed``.

    A sample's id is its place in that order. An image has the run's shape, cropped to its
    proportions and no further; its JPEG file is kept where it is of that very shape.

    Args:
        folder: with a sub-folder a class, called as ``dpfast.data.class_folders`` says; or with the
            files of Fashion-MNIST, of which it takes the training images.
        classes: the run's, by id; shape: (C, H, W).
        order: the run's labels, which with class counts say how many of each class.
        files: whether the pool keeps JPEG files.
        device: where the images are handed over.

    Raises ``InputError`` for a folder that is missing, holds other classes, or no image of one.
    """

    def __init__(
        self,
        folder: str,
        classes: Sequence[str],
        shape: tuple[int, ...],
        *,
        order: LabelOrder,
        seed: int,
        most: int,
        files: bool = False,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        check_training(folder, classes)
        self._files, self._device, self._ranks = files, device, ranks
        labels, self._read = _opened(Path(folder), classes, shape)
        self.total = len(labels)
        shuffled = permutation(0, self.total, self.total, seed=seed, epoch=0, stream=STREAM)
        self._rows = shuffled[chosen(labels[shuffled], order, most, f"real = {folder!r}")]
        self._labels = labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def first(self, count: int) -> RealImages:
        """Returns the first ``count`` of them."""
        fewer = copy.copy(self)
        fewer._rows, fewer._labels = self._rows[:count], self._labels[:count]
        return fewer

    def batch(self, places: range) -> SampleBatch:
        rows = self._rows[places.start : places.stop].tolist()
        with ThreadPoolExecutor(max(cpus() // self._ranks.local_size, 1)) as threads:
            found = list(threads.map(self._one, rows))
        self._ranks.beat()
        origins = np.zeros(len(rows), RECORD)  # of no seed, no step and no guidance
        origins["cfg_scale"] = 1
        return SampleBatch(
            images=torch.stack([image for image, _ in found]).to(self._device),
            labels=self._labels[places.start : places.stop].to(self._device),
            sample_ids=torch.arange(places.start, places.stop, device=self._device),
            entropy=torch.full((len(rows),), float("nan"), device=self._device),
            files=[file for _, file in found if file is not None] if self._files else None,
            origins=origins,
        )

    def _one(self, row: int) -> tuple[Tensor, bytes | None]:
        """Returns an image, and the JPEG file that a pool of them keeps."""
        image, file = self._read(row)
        if not self._files:
            return image, None
        return image, to_jpeg(image) if file is None else file


def _opened(folder: Path, classes: Sequence[str], shape: tuple[int, ...]) -> tuple[Tensor, Read]:
    """Returns the labels (N,) of a folder's images, and what reads one of them."""
    if fashion.holds_split(folder, "train"):
        images, labels = fashion.read_split(folder, "train")
        return labels, lambda row: (fit_pixels(images[row], shape), None)
    ids = imagenet_ids(folder, classes)
    found = open_folder(folder, classes, shape, ids=ids, only=True, field="real")
    return torch.tensor(found.labels), partial(_read, found.files, shape)


def _read(files: Sequence[Path], shape: tuple[int, ...], row: int) -> tuple[Tensor, bytes | None]:
    path = files[row]
    try:
        with reading(path):
            data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return fit_file(data, str(path), shape)
