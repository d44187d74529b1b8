"""The real images of a run: a validation half that drives patience and a held-out half that is only
reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dpfast import imagenet
from dpfast.config import ASSETS
from dpfast.data import fashion
from dpfast.data.folders import (
    BATCH,
    SUFFIXES,
    ImageFolder,
    class_folders,
    images_in,
    open_folder,
    read_image,
)
from dpfast.errors import InputError
from dpfast.hardware.cpus import cpus
from dpfast.parallel import ALONE, Ranks


@dataclass(frozen=True)
class RealSet:
    """images: (N, C, H, W) uint8; labels: (N,) int64. Of several ranks each has its own part
    (``Ranks.indices``).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RealData:
    """What a run knows of the real world. Neither set is ever trained on."""

    classes: tuple[str, ...]
    validation: RealSet
    test: RealSet


def load_real(
    name: str,
    *,
    held_out: str = "",
    classes: Sequence[str] = (),
    shape: Sequence[int] | None = None,
    ranks: Ranks = ALONE,
) -> RealData:
    """Loads an embedded set, or folders of images with a sub-folder for each class.

    "fashion": the 10,000 Fashion-MNIST test images in their order; even positions are validation,
    odd ones test. A folder is split the same way, within each class, unless ``held_out`` names
    another one for the test.

    classes: the generator's, by id; shape: (C, H, W) that folders are read in. Sub-folders are
    called as ``dpfast.data.folders.open_folder`` says, or by a WordNet id. ranks: each reads its
    own part.

    Raises ``InputError`` for an unknown name, and for a folder without images for a class or with
    others.
    """
    check_real(name, held_out)
    if name == "fashion":
        images, labels = fashion.read_split(ASSETS / "fashion_test", "t10k")
        return RealData(
            fashion.CLASSES, _part(images, labels, 0, ranks), _part(images, labels, 1, ranks)
        )
    folder = _open(name, "validation", classes, shape)
    if held_out:
        other = _open(held_out, "held_out", classes, shape)
        return RealData(tuple(classes), read_all(folder, ranks), read_all(other, ranks))
    place, seen = [], [0] * len(classes)
    for label in folder.labels:
        place.append(seen[label] % 2)
        seen[label] += 1
    few = [classes[label] for label, count in enumerate(seen) if count < 2]
    if few:
        raise InputError(
            f"validation = {name!r}: {few[0]!r} has one image, expected two or more, or a held_out "
            "folder"
        )
    halves = [[i for i, half in enumerate(place) if half == wanted] for wanted in (0, 1)]
    return RealData(tuple(classes), *(read_all(folder.subset(half), ranks) for half in halves))


def count_real(name: str, held_out: str = "", *, classes: int = 0) -> tuple[int, int]:
    """How many images ``load_real`` will take for validation and test; without such folders 25 a
    class for each.
    """
    if name == "fashion":
        return 5000, 5000
    found = [
        sum(1 for file in Path(place).rglob("*") if file.suffix.lower() in SUFFIXES) if place else 0
        for place in (name, held_out)
    ]
    if not found[0]:
        return 25 * classes, 25 * classes
    return (found[0], found[1]) if held_out else (-(-found[0] // 2), found[0] // 2)


def check_real(name: str, held_out: str = "", classes: Sequence[str] = ()) -> None:
    """Raises ``InputError`` where a folder that ``load_real`` will read is missing.

    With ``classes`` also where it has others, or no image of one. Looks at names, to the first
    image of each class.
    """
    for field, place in (("validation", name), ("held_out", held_out)):
        path = Path(place)
        if place in ("", "fashion"):
            continue
        if path.is_dir() and any(entry.is_dir() for entry in path.iterdir()):
            if classes:
                _check_classes(place, field, classes)
            continue
        what = "it has no sub-folders" if path.is_dir() else "no such folder"
        option = f"--{field.replace('_', '-')}"
        raise InputError(
            f"{field} = {place!r}: {what}; expected 'fashion', or {option} FOLDER with a "
            "sub-folder of real images for each class"
        )


def _open(
    name: str, field: str, classes: Sequence[str], shape: Sequence[int] | None
) -> ImageFolder:
    if shape is None or not classes:
        raise InputError(
            f"{field} = {name!r}: a folder needs the classes and the shape of the generator's "
            "images"
        )
    folder = open_folder(
        Path(name),
        classes,
        tuple(shape),
        ids=imagenet.load().ids_of(classes),
        only=True,
        field=field,
    )
    _complete(name, field, classes, folder.labels)
    return folder


def _check_classes(name: str, field: str, classes: Sequence[str]) -> None:
    ids = imagenet.load().ids_of(classes)
    folders = class_folders(Path(name), classes, ids=ids, only=True, field=field)
    _complete(name, field, classes, [label for folder, label in folders if any(images_in(folder))])


def _complete(name: str, field: str, classes: Sequence[str], labels: Iterable[int]) -> None:
    missing = sorted(set(range(len(classes))) - set(labels))
    if missing:
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise InputError(f"{field} = {name!r}: no images of {classes[missing[0]]!r}{more}")


def read_all(folder: ImageFolder, ranks: Ranks = ALONE) -> RealSet:
    """Reads and decodes this rank's images, on its share of the job's CPUs."""
    folder = folder.subset(ranks.indices(len(folder), BATCH).tolist())
    with ThreadPoolExecutor(max(cpus() // ranks.local_size, 1)) as threads:
        images = torch.empty(len(folder), *folder.shape, dtype=torch.uint8)
        for i, image in enumerate(
            threads.map(lambda file: read_image(file, folder.shape), folder.files)
        ):
            images[i] = image
            ranks.beat()
    return RealSet(images, torch.tensor(folder.labels, dtype=torch.int64))


def _part(images: Tensor, labels: Tensor, first: int, ranks: Ranks) -> RealSet:
    images, labels = images[first::2], labels[first::2]
    mine = ranks.indices(len(labels), BATCH)
    return RealSet(images[mine], labels[mine])
