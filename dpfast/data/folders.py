"""Folders of real images, one sub-folder a class, read in batches of a classifier's size and
channels.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dpfast.data.class_folders import class_folders
from dpfast.data.jpeg import read_header
from dpfast.data.pictures import pictures_in, pixels, read_picture, upright
from dpfast.errors import InputError
from dpfast.files import is_folder
from dpfast.parallel import ALONE, Ranks

CROP = 0.875  # of the shorter side: the usual central crop of ImageNet's evaluation
MODES = {1: "L", 3: "RGB"}
BATCH = 500  # images that are read, or predicted, at a time


@dataclass(frozen=True)
class ImageFolder:
    """Labelled image files. files: sorted paths; labels: class ids beside them; shape: (C, H, W) of
    what is read.
    """

    path: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Sequence[int]) -> ImageFolder:
        return replace(
            self,
            files=tuple(self.files[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
        )

    def batches(self, ranks: Ranks = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this rank's images (n, C, H, W) uint8 and labels (n,). Raises ``InputError`` for a
        file that is no image.
        """
        for rows in ranks.batches(len(self), BATCH):
            files, labels = (
                self.files[rows.start : rows.stop],
                self.labels[rows.start : rows.stop],
            )
            yield (
                torch.stack([read_image(file, self.shape) for file in files]),
                torch.tensor(labels),
            )


def open_folder(
    path: Path,
    classes: Sequence[str],
    shape: tuple[int, ...],
    *,
    ids: Sequence[str] | None,
    only: bool = False,
    field: str = "folder",
) -> ImageFolder:
    """Lists ``path``; no image is read yet.

    Args:
        path: the folder; its sub-folders, one a class, are called as ``dpfast.data.class_folders``
            says, and hold images (``dpfast.data.pictures``) at any depth.
        classes: the classifier's, by index.
        shape: (C, H, W); C is 1 or 3.
        ids, only, field: as in ``class_folders``.

    Raises ``InputError`` when the folder does not exist or holds no images, and as
    ``class_folders`` does.
    """
    if shape[0] not in MODES:
        raise InputError(
            f"{field} = {str(path)!r}: image files hold 1 "
            f"or 3 channels, the learner takes {shape[0]}"
        )
    if not is_folder(path):
        raise InputError(f"{field} = {str(path)!r}: no such folder")
    pairs = [
        (file, label)
        for folder, label in class_folders(path, classes, ids=ids, only=only, field=field)
        for file in sorted(pictures_in(folder))
    ]
    if not pairs:
        raise InputError(
            f"{field} = {str(path)!r}: no images; "
            "expected a sub-folder of image files for each class"
        )
    return ImageFolder(
        path, tuple(f for f, _ in pairs), tuple(label for _, label in pairs), tuple(shape)
    )


def read_image(file: Path, shape: tuple[int, ...]) -> Tensor:
    """Returns one image (C, H, W) uint8, fitted as ``fit_picture`` does.

    Raises ``InputError`` for a file that is no image (``dpfast.data.pictures``).
    """
    return _fitted(read_picture(file, str(file)), shape)


def fit_picture(picture: Image.Image, shape: tuple[int, ...]) -> Tensor:
    """Returns (C, H, W) uint8 of a picture: the largest central part of the right proportions, of
    it 7/8, resized (bicubic).

    A picture that has the size already is taken as it is. Modes and orientation are those of
    ``dpfast.data.pictures``. Raises what its ``upright`` raises.
    """
    return _fitted(upright(picture), shape)


def fit_file(data: bytes, name: str, shape: tuple[int, ...]) -> tuple[Tensor, bytes | None]:
    """Returns one image to train on: (C, H, W) uint8 of an image file's bytes, the largest central
    part of the right proportions; and the bytes where they are a JPEG file of that very shape.

    Nothing is cut beyond the proportions: that is left to the learner's augmentation. name: of the
    file. Raises ``InputError`` for a file that is no image.
    """
    image = _fitted(read_picture(io.BytesIO(data), name), shape, crop=1.0)
    with contextlib.suppress(InputError):  # what Pillow alone makes something of
        header = read_header(data, name)
        if (header.channels, *(header.shown or ())) == tuple(shape):
            return image, data
    return image, None


def fit_pixels(pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns (C, H, W) uint8 of an image (c, h, w) of 1 or 3 channels, as ``fit_file`` fits it."""
    if tuple(pixels.shape) == tuple(shape):
        return pixels
    rows = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return _fitted(Image.fromarray(rows.contiguous().cpu().numpy()), shape, crop=1.0)


def _fitted(picture: Image.Image, shape: tuple[int, ...], crop: float = CROP) -> Tensor:
    channels, height, width = shape
    picture = picture.convert(MODES[channels])
    if picture.size != (width, height):
        scale = crop * min(picture.width / width, picture.height / height)
        left, top = (picture.width - scale * width) / 2, (picture.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(pixels(picture))
