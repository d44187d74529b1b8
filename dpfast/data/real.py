"""The real images of a run: a validation half that drives patience and a held-out half that is only
reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dpfast.config import ASSETS
from dpfast.data import fashion
from dpfast.data.class_folders import (
    class_folders,
    holds_classes,
    imagenet_ids,
    sub_folders,
)
from dpfast.data.folders import (
    BATCH,
    ImageFolder,
    fit_picture,
    open_folder,
    read_image,
)
from dpfast.data.pictures import pictures_in
from dpfast.errors import InputError, first_line
from dpfast.files import is_folder
from dpfast.hardware.cpus import cpus
from dpfast.labels import class_id, class_ids
from dpfast.parallel import ALONE, Ranks

Labels = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True)
class RealSet:
    """Real images with their labels. Of several ranks each has its own part (``Ranks.indices``).

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 class ids.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RealData:
    """The real images of a run in two sets, neither of which is ever trained on.

    Attributes:
        classes: Names of the classes, whose indices are the labels.
        validation: Images whose accuracy drives patience.
        test: Held-out images, which are only reported.

    Examples:
        >>> import torch
        >>> from dpfast import RealData
        >>> images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
        >>> real = RealData.split(images, [0, 0, 0, 0, 1, 1], classes=("cat", "dog"))
        >>> real.validation.labels, real.test.labels
        (tensor([0, 0, 1]), tensor([0, 0, 1]))
    """

    classes: tuple[str, ...]
    validation: RealSet
    test: RealSet

    @classmethod
    def split(
        cls, images: Tensor | np.ndarray, labels: Labels, classes: Iterable[str] = ()
    ) -> RealData:
        """Splits images into two halves: every second one of each class is held out.

        Args:
            images: (N, C, H, W) uint8, or floats in [0, 1]; of NumPy, too.
            labels: (N,) integers; of NumPy or a list, too.
            classes: Names of the classes, whose indices are the labels; none: "0", "1", ...

        Raises:
            InputError: For other shapes and types, labels without a class, and classes of fewer
                than two images.
        """
        names = tuple(classes)
        pictures, given = _tensor("images", images), _tensor("labels", labels)
        ids = _checked(pictures, given, len(names) or None).cpu()
        if not len(ids):
            raise InputError("real: no images, expected two or more of each class")
        names = names or tuple(str(i) for i in range(int(ids.max()) + 1))
        halves = _halves(ids.tolist(), names, "real")
        pictures = _pixels(pictures).cpu()
        return cls(names, *(RealSet(pictures[half], ids[half]) for half in halves))


# Real images as a caller may have them: of a Dataset each item is an image and a label.
Given = RealData | tuple[Tensor, Tensor] | Dataset


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
    called as ``dpfast.data.class_folders`` says. ranks: each reads its
    own part.

    Raises ``InputError`` for an unknown name, and for a folder without images for a class or with
    others.
    """
    check_real(name, held_out)
    if is_fashion(name):
        images, labels = fashion.read_split(ASSETS / "fashion_test", "t10k")
        return RealData(
            fashion.CLASSES, _part(images, labels, 0, ranks), _part(images, labels, 1, ranks)
        )
    folder = _open(name, "validation", classes, shape)
    if held_out:
        other = _open(held_out, "held_out", classes, shape)
        return RealData(tuple(classes), read_all(folder, ranks), read_all(other, ranks))
    halves = _halves(folder.labels, classes, f"validation = {name!r}")
    return RealData(tuple(classes), *(read_all(folder.subset(half), ranks) for half in halves))


def given_real(
    real: Given, *, classes: Sequence[str], shape: Sequence[int], ranks: Ranks = ALONE
) -> RealData:
    """Returns the real images of a run from what a caller has: ``RealData`` as it is, the rest
    split by ``RealData.split``.

    Args:
        real: ``RealData``, of which each rank gives its own part (``Ranks.indices``); a pair of
            images and labels; or a ``Dataset`` with a length. The images of a Dataset may be
            pictures of PIL as well, which are cropped and resized like those of a folder.
        classes: names of the generator's classes.
        shape: (C, H, W) of the generator's images.
        ranks: each gets its part.

    Raises ``InputError`` where classes or shapes differ from the generator's, and for other kinds
    of objects.
    """
    if isinstance(real, RealData):
        found = real
    elif not isinstance(real, tuple):
        found = _read_dataset(real, classes, tuple(shape), ranks)
    else:
        images, labels = _pair(real)
        _checked(images, labels, len(classes))
        _check_shape(images, shape)
        whole = RealData.split(images, labels, classes)
        parts = (whole.validation, whole.test)
        mine = [ranks.indices(len(part), BATCH) for part in parts]
        sets = [RealSet(p.images[i], p.labels[i]) for p, i in zip(parts, mine, strict=True)]
        found = RealData(whole.classes, *sets)
    if len(found.classes) != len(classes):
        raise InputError(f"real: {len(found.classes)} classes, the generator has {len(classes)}")
    _check_names(found.classes, classes)
    for name, part in (("validation", found.validation), ("test", found.test)):
        if not isinstance(part, RealSet) or not isinstance(part.images, Tensor):
            raise InputError(f"real: its {name} set is no RealSet of tensors")
        if ranks.alone and not len(part):
            raise InputError(f"real: its {name} set holds no images, expected one or more")
        _checked(part.images, part.labels, len(found.classes))
        _check_shape(part.images, shape)
        if part.images.dtype != torch.uint8:
            raise InputError(f"real: images are {part.images.dtype}, expected torch.uint8")
    return found


def _check_names(given: Sequence[str], classes: Sequence[str]) -> None:
    """Raises ``InputError`` where a class has another name than the generator's: labels would count
    as other classes. Numbers in their order are no names ("0", "class 1").
    """
    counted = [[f"{i}" for i in range(len(given))], [f"class {i}" for i in range(len(given))]]
    if list(given) in counted or list(classes) in counted or len(classes) < 2:
        return
    for label, (one, other) in enumerate(zip(given, classes, strict=True)):
        if one != other:
            order = "the same names in another order" if {*given} == {*classes} else "other names"
            raise InputError(
                f"real: class {label} is {one!r}, the generator's is {other!r} ({order}); expected "
                "its classes in their order"
            )


def _pair(real: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    """Returns the images and the labels of a pair. Raises ``InputError`` for other things than
    tensors.
    """
    kinds = " and ".join(type(part).__name__ for part in real)
    if len(real) != 2:
        raise InputError(f"real is a tuple of {kinds}: expected two tensors, images and labels")
    images, labels = real
    arrays = (Tensor, np.ndarray)
    if not (isinstance(images, arrays) and isinstance(labels, (*arrays, list))):
        raise InputError(f"real is a pair of {kinds}: expected two tensors, images and labels")
    return _tensor("images", images), _tensor("labels", labels)


def _tensor(what: str, given: object) -> Tensor:
    """Returns a tensor of what a caller gave. Raises ``InputError`` for what is none and becomes
    none.
    """
    if isinstance(given, (np.ndarray, list, tuple)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return torch.as_tensor(given)
    if not isinstance(given, Tensor):
        raise InputError(f"real: {what} are a {type(given).__name__}, expected a tensor")
    return given


def _read_dataset(
    real: object, classes: Sequence[str], shape: tuple[int, ...], ranks: Ranks
) -> RealData:
    """Reads a Dataset once, in its order, and keeps this rank's part of each half: of an image that
    is another rank's the label alone, so that a node holds every image once.
    """
    if not (hasattr(real, "__getitem__") and hasattr(real, "__len__")) or isinstance(real, str):
        raise InputError(
            f"real is a {type(real).__name__}: expected dpfast.RealData, images and labels as "
            "tensors, or a Dataset of (image, label)"
        )
    try:
        count = len(real)
    except Exception as error:  # whatever the caller's class raises
        raise InputError(f"real: its length cannot be told: {first_line(error)}") from error
    labels: list[int] = []
    seen = [0] * len(classes)
    sizes = [0, 0]
    mine: tuple[list[tuple[Tensor, int]], ...] = ([], [])
    for number in range(count):
        image, label = _item(real, number, shape, len(classes))
        half = seen[label] % 2
        if ranks.share(sizes[half] + 1, BATCH) > ranks.share(sizes[half], BATCH):
            mine[half].append((image, label))
        labels.append(label)
        seen[label] += 1
        sizes[half] += 1
        ranks.beat()
    _halves(labels, classes, "real")
    return RealData(tuple(classes), *(_joined(part, shape) for part in mine))


def _item(real: Any, number: int, shape: tuple[int, ...], classes: int) -> tuple[Tensor, int]:
    """Returns an image (C, H, W), uint8, and its label. Raises ``InputError`` for other things."""
    try:
        image, label = real[number]
        image = fit_picture(image, shape) if isinstance(image, Image.Image) else image
        image = _dense(torch.as_tensor(image))
    except Exception as error:  # whatever the caller's class raises
        raise InputError(
            f"real: item {number} is no image and label: {first_line(error)}"
        ) from error
    _check_shape(image[None], shape)
    return _pixels(image), class_id(label, f"real: item {number}", classes)


def _joined(items: list[tuple[Tensor, int]], shape: tuple[int, ...]) -> RealSet:
    images = torch.empty(len(items), *shape, dtype=torch.uint8)
    for row, (image, _) in enumerate(items):
        images[row] = image
    return RealSet(images, torch.tensor([label for _, label in items], dtype=torch.int64))


def _dense(images: Tensor) -> Tensor:
    """Returns ``images``, whose values lie in memory one by one; ``InputError`` for those of which
    none or some do.
    """
    if images.layout != torch.strided or images.device.type == "meta":
        raise InputError(
            f"real: images are {images.layout} on {images.device}, expected a dense tensor"
        )
    return images


def _pixels(images: Tensor) -> Tensor:
    """Returns uint8 of images that are uint8, or floats in [0, 1]."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError(
            f"real: images are {images.dtype}, expected torch.uint8, or floats between 0 and 1"
        )
    return images.mul(255).round().byte()


def _checked(images: Tensor, labels: Tensor, classes: int | None) -> Tensor:
    """Returns the labels as int64. Raises ``InputError`` unless these are images (N, C, H, W) and
    their N class ids.
    """
    images, labels = _tensor("images", images), _tensor("labels", labels)
    if _dense(images).dim() != 4:
        raise InputError(f"real: images of shape {tuple(images.shape)}, expected (N, C, H, W)")
    return class_ids(labels, len(images), "real", classes)


def _check_shape(images: Tensor, shape: Sequence[int]) -> None:
    if tuple(images.shape[1:]) != tuple(shape):
        raise InputError(
            f"real: images of shape {tuple(images.shape[1:])}, the generator's are {tuple(shape)}"
        )


def _halves(labels: Sequence[int], classes: Sequence[str], what: str) -> list[list[int]]:
    """Returns indices of the validation half and of the held-out one: the images of a class in
    turn.

    Raises ``InputError`` that begins with ``what`` for a class of fewer than two.
    """
    place, seen = [], [0] * len(classes)
    for label in labels:
        place.append(seen[label] % 2)
        seen[label] += 1
    few = [(name, count) for name, count in zip(classes, seen, strict=True) if count < 2]
    if few:
        name, count = few[0]
        raise InputError(
            f"{what}: {name!r} has {'one image' if count else 'no image'}, expected two or more, "
            "or a held_out folder"
        )
    return [[i for i, half in enumerate(place) if half == wanted] for wanted in (0, 1)]


def is_fashion(place: str) -> bool:
    """Returns True if a recipe's folder of real images is the embedded set, rather than a folder of
    that name.
    """
    return place == "fashion" and not holds_classes(Path(place))


def count_real(name: str, held_out: str = "", *, classes: int = 0) -> tuple[int, int]:
    """Counts the images that ``load_real`` will take for validation and test; without such folders
    25 a class for each.
    """
    if is_fashion(name):
        return 5000, 5000
    found = [
        sum(1 for _ in pictures_in(Path(place))) if place and is_folder(Path(place)) else 0
        for place in (name, held_out)
    ]
    if not found[0]:
        return 25 * classes, 25 * classes
    return (found[0], found[1]) if held_out else (-(-found[0] // 2), found[0] // 2)


def check_training(folder: str, classes: Sequence[str]) -> None:
    """Raises ``InputError`` where a folder holds no images to train on, those of other classes, or
    none of one. Looks at names, to the first image of each class.
    """
    path = Path(folder)
    if is_folder(path) and fashion.holds_split(path, "train"):
        if tuple(classes) != fashion.CLASSES:
            raise InputError(
                f"real = {folder!r}: holds Fashion-MNIST, of other classes than the run's "
                f"({', '.join(classes[:3])}, ...)"
            )
        return
    if is_folder(path) and sub_folders(path):
        _check_classes(folder, "real", classes)
        return
    what = "it has no sub-folders" if is_folder(path) else "no such folder"
    raise InputError(
        f"real = {folder!r}: {what}; expected a folder with a sub-folder of images to train on for "
        "each class, or that of Fashion-MNIST with train-images-idx3-ubyte.gz"
    )


def check_apart(field: str, folder: str, validation: str, held_out: str) -> None:
    """Raises ``InputError`` where the folder of ``field``, to train on, or one of its sub-folders
    is one of the validation or of the test, by whatever path. Images are not looked at.
    """
    mine = _folders(folder)
    for other, place in (("validation", validation), ("held_out", held_out)):
        if place and not is_fashion(place) and (both := mine & _folders(place)):
            shared = str(min(both))
            raise InputError(
                f"{field} = {folder!r}: {shared!r} is a folder of {other} = {place!r}; expected "
                "images to train on that drive and test nothing"
            )


def _folders(place: str) -> set[Path]:
    """Returns a folder and its sub-folders, links followed; none where it is not there."""
    path = Path(place)
    return {each.resolve() for each in (path, *sub_folders(path))} if is_folder(path) else set()


def count_training(folder: str) -> int:
    """Counts the images to train on in a folder; 0 where it is not there."""
    path = Path(folder)
    if not folder or not is_folder(path):
        return 0
    if fashion.holds_split(path, "train"):
        return len(fashion.read_split(path, "train")[1])
    return sum(1 for _ in pictures_in(path))


def check_real(name: str, held_out: str = "", classes: Sequence[str] = ()) -> None:
    """Raises ``InputError`` where a folder that ``load_real`` will read is missing.

    With ``classes`` also where it has others, or no image of one. Looks at names, to the first
    image of each class.
    """
    for field, place in (("validation", name), ("held_out", held_out)):
        path = Path(place)
        if not place or (field == "validation" and is_fashion(place)):
            continue
        if is_folder(path) and sub_folders(path):
            if classes:
                _check_classes(place, field, classes)
            continue
        what = "it has no sub-folders" if is_folder(path) else "no such folder"
        option = f"--{field.replace('_', '-')}"
        raise InputError(
            f"{field} = {place!r}: {what}; expected 'fashion', or {option} FOLDER with a "
            "sub-folder of real images for each class"
        )
    if held_out and is_fashion(name):
        raise InputError(
            f"held_out = {held_out!r}: 'fashion' holds test images of its own; expected '', or a "
            "folder for validation as well"
        )


def _open(
    name: str, field: str, classes: Sequence[str], shape: Sequence[int] | None
) -> ImageFolder:
    if shape is None or not classes:
        raise InputError(
            f"{field} = {name!r}: a folder needs the "
            "classes and the shape of the generator's images"
        )
    folder = open_folder(
        Path(name),
        classes,
        tuple(shape),
        ids=imagenet_ids(Path(name), classes),
        only=True,
        field=field,
    )
    _complete(name, field, classes, folder.labels)
    return folder


def _check_classes(name: str, field: str, classes: Sequence[str]) -> None:
    ids = imagenet_ids(Path(name), classes)
    folders = class_folders(Path(name), classes, ids=ids, only=True, field=field)
    filled = [label for folder, label in folders if any(pictures_in(folder))]
    _complete(name, field, classes, filled)


def _complete(name: str, field: str, classes: Sequence[str], labels: Iterable[int]) -> None:
    missing = sorted(set(range(len(classes))) - set(labels))
    if missing:
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise InputError(
            f"{field} = {name!r}: no images of {classes[missing[0]]!r}{more}, expected one or more"
        )


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
