"""Folders of real images as they come: with other names, with what is no image, with links."""

from __future__ import annotations

import os
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpfast import imagenet
from dpfast.data.folders import open_folder
from dpfast.data.real import RealSet, load_real
from dpfast.evaluate.sets import evaluation_sets
from tests.bad_inputs.case import NEVER, Case, generated, listed
from tests.bad_inputs.files import picture


def write(folder: Path, name: str, *levels: int) -> None:
    """Pictures of these levels in ``folder/name``."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for level in levels:
        (folder / name / f"{level:03d}.png").write_bytes(picture(level))


def opened(path: Path, classes: Sequence[str]) -> list[tuple[int, int]]:
    """(level, label) of every image, as the folder is read."""
    ids = imagenet.load().ids_of(classes)
    found = open_folder(path, classes, (1, 8, 8), ids=ids)
    return sorted(
        (int(image[0, 0, 0]), label)
        for images, labels in found.batches()
        for image, label in zip(images, labels.tolist(), strict=True)
    )


def _opened(
    folder: Path, classes: Sequence[str], right: Any, *named: str, valid: bool = False
) -> Case:
    return Case(lambda: opened(folder, classes), named or (folder.name,), right, valid=valid)


def classes(names: Sequence[str], random: random.Random, folder: Path) -> Case:
    """Each class in a folder of exactly its name, which is therefore its."""
    safe = [name for name in names if "/" not in name]
    for level, name in enumerate(safe):
        write(folder, name, level)
    right = sorted((level, names.index(name)) for level, name in enumerate(safe))
    return _opened(folder, names, right, valid=True)


listed(
    "folders",
    {
        "plain": ["cat", "dog", "red bicycle"],
        "sorted-numbers": sorted(str(k) for k in range(12)),
        "shifted-numbers": [str((k + 1) % 10) for k in range(10)],
        "zeros-before": ["01", "1", "001"],
        "case": ["A", "a", "B"],
        "german": ["Maß", "MASS", "mass"],
        "punctuation": ["C+", "C-", "C"],
        "dashes": ["a b", "a-b", "a_b"],
        "like-an-export": ["0001-a", "a", "b"],
        "composed": [unicodedata.normalize("NFC", "café"), "cafe"],
        "turkish": ["İstanbul", "istanbul"],
        "wide-digits": ["1", "2", "\uff13"],
        "wordnet-ids": ["n01440764", "n01443537"],
        "of-imagenet": ["tench", "goldfish"],
        "hidden-looking": ["cat.", "dog..."],
        "chinese": ["猫", "犬"],
    },
    classes,
)


@generated(3)
def any_names(random: random.Random, folder: Path) -> Case:
    """Names of chance, each in its own folder."""
    letters = "aAbB01 -_+.éß٣"
    names = sorted(
        {"x" + "".join(random.choices(letters, k=random.randrange(1, 4))) for _ in range(8)}
    )
    random.shuffle(names)
    return classes(names, random, folder)


def called(given: tuple[list[str], str, Any], random: random.Random, folder: Path) -> Case:
    """One folder by another name, that of a class or of none."""
    names, name, label = given
    write(folder, name, 5)
    right = NEVER if label is None else [(5, label)]
    return _opened(folder, names, right, name if name.isprintable() else ascii(name)[1:-1])


listed(
    "folders",
    {
        "by-its-id": (["cat", "dog"], "1", 1),
        "as-exported": (["cat", "dog"], "0001-dog", 1),
        "as-exported-wrongly": (["cat", "dog"], "0000-dog", None),
        "in-lower-case": (["Cat", "Dog"], "dog", 1),
        "in-either-case": (["DOG", "dog"], "Dog", None),
        "decomposed": (["cat", "café"], unicodedata.normalize("NFD", "café"), 1),
        "with-dashes": (["cat", "T-shirt/top"], "T-shirt-top", 1),
        "with-dashes-of-two": (["a+b", "a/b"], "a-b", None),
        "unknown": (["cat", "dog"], "cow", None),
        "too-high-an-id": (["cat", "dog"], "2", None),
        "negative-id": (["cat", "dog"], "-1", None),
        "blank-behind": (["cat", "dog"], "dog ", 1),
        "newline": (["cat", "dog"], "do\ng", None),
        "not-unicode": (["cat", "dog"], os.fsdecode(b"caf\xe9"), None),
        "wordnet-unknown": (["tench", "goldfish"], "n00000001", None),
        "number-of-imagenet": (["goldfish", "tench"], "1", 0),
    },
    called,
)


@generated(2)
def two_folders_of_one_class(random: random.Random, folder: Path) -> Case:
    write(folder, "dog", 1)
    write(folder, random.choice(["Dog", "1", "0001-dog"]), 2)
    return _opened(folder, ["cat", "dog"], NEVER)


@generated(3)
def hidden(random: random.Random, folder: Path) -> Case:
    """What no dataset holds: hidden folders beside the classes and in them, hidden files."""
    write(folder, "cat", 1, 2)
    write(folder, random.choice([".ipynb_checkpoints", ".cat", ".git", "._cat"]), 7)
    write(folder / "cat", random.choice([".thumbnails", ".cache"]), 8)
    (folder / "cat" / "._001.png").write_bytes(random.randbytes(90))
    (folder / "cat" / ".001.png").write_bytes(picture(9))
    (folder / "cat" / "Thumbs.db").write_bytes(b"\xd0\xcf")
    return _opened(folder, ["cat"], [(1, 0), (2, 0)], valid=True)


@generated(2)
def links(random: random.Random, folder: Path) -> Case:
    """A class and an image that lie elsewhere count as if they lay there."""
    root, store = folder / "data", folder / "store"
    write(root, "cat", 1)
    write(store, "mine", 3)
    (root / "dog").symlink_to(store / "mine", target_is_directory=True)
    (root / "cat" / "x.png").symlink_to(store / "mine" / "003.png")
    (root / "cat" / "more").symlink_to(store / "mine", target_is_directory=True)
    right = [(1, 0), (3, 0), (3, 0), (3, 1)]
    return Case(lambda: opened(root, ["cat", "dog"]), ("data",), right, valid=True)


@generated(2)
def links_in_a_circle(random: random.Random, folder: Path) -> Case:
    write(folder, "cat", 1)
    (folder / "cat" / "again").symlink_to(folder / random.choice([".", "cat"]))
    return _opened(folder, ["cat"], [(1, 0)], "again")


def no_image(kind: str, random: random.Random, folder: Path) -> Case:
    write(folder, "cat", 1)
    path = folder / "cat" / "x.png"
    right: Any = NEVER
    if kind == "broken-link":
        path.symlink_to(folder / "gone.png")
    elif kind == "link-to-itself":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
        right = [(1, 0)]
    elif kind == "folder":
        write(folder / "cat", "x.png", 7)
        right = [(1, 0), (7, 0)]
    elif kind == "empty-folder":
        path.mkdir()
        right = [(1, 0)]
    return _opened(folder, ["cat"], right, "x.png")


listed(
    "folders",
    {k: k for k in ("broken-link", "link-to-itself", "pipe", "folder", "empty-folder")},
    no_image,
)


@generated(1)
def files_in_the_root(random: random.Random, folder: Path) -> Case:
    """No class's, as for torchvision."""
    write(folder, "cat", 1)
    (folder / "stray.png").write_bytes(picture(9))
    (folder / "README.md").write_bytes(b"about")
    return _opened(folder, ["cat"], [(1, 0)], "stray.png")


@generated(1)
def capital_suffixes(random: random.Random, folder: Path) -> Case:
    write(folder, "cat")
    for level, suffix in enumerate((".PNG", ".Jpg", ".JPEG", ".WebP", ".bmp")):
        (folder / "cat" / f"{level}{suffix}").write_bytes(picture(level))
    return _opened(folder, ["cat"], [(level, 0) for level in range(5)], valid=True)


def root(kind: str, random: random.Random, folder: Path) -> Case:
    path = folder / "data"
    if kind == "file":
        path.write_bytes(picture(1))
    elif kind == "empty":
        path.mkdir()
    elif kind == "empty-classes":
        (path / "cat").mkdir(parents=True)
    elif kind == "images-alone":
        write(folder, "data", 1, 2)
    elif kind == "broken-link":
        path.symlink_to(folder / "gone")
    return _opened(path, ["cat"], NEVER, "data")


listed(
    "folders",
    {k: k for k in ("missing", "file", "empty", "empty-classes", "images-alone", "broken-link")},
    root,
)


def _real(path: Path, names: Sequence[str]) -> Any:
    real = load_real(str(path), classes=names, shape=(1, 8, 8))
    halves = (
        (half.images[:, 0, 0, 0].tolist(), half.labels.tolist())
        for half in (real.validation, real.test)
    )
    return [sorted(zip(*half, strict=True)) for half in halves]


@generated(1)
def validation(random: random.Random, folder: Path) -> Case:
    write(folder, "cat", 1, 2)
    write(folder, "dog", 3, 4)
    right = [[(1, 0), (3, 1)], [(2, 0), (4, 1)]]
    return Case(lambda: _real(folder, ["cat", "dog"]), (folder.name,), right, valid=True)


def validation_with(kind: str, random: random.Random, folder: Path) -> Case:
    write(folder, "cat", 1, 2)
    if kind == "one-image":
        write(folder, "dog", 3)
    elif kind == "empty-class":
        (folder / "dog").mkdir()
    elif kind == "one-image-and-a-hidden-one":
        write(folder, "dog", 3)
        (folder / "dog" / ".4.png").write_bytes(picture(4))
    elif kind == "unknown-class":
        write(folder, "dog", 3, 4)
        write(folder, "cow", 5, 6)
    elif kind == "text-files":
        write(folder, "dog")
        (folder / "dog" / "a.txt").write_bytes(b"x")
    return Case(lambda: _real(folder, ["cat", "dog"]), ("dog", "cow"))


listed(
    "folders",
    {
        k: k
        for k in (
            *("class-missing", "one-image", "empty-class", "one-image-and-a-hidden-one"),
            *("unknown-class", "text-files"),
        )
    },
    validation_with,
)


def evaluation(given: tuple[Sequence[str], Any], random: random.Random, folder: Path) -> Case:
    """A set by its name and folder, of a learner of two of ImageNet's classes."""
    names, right = given
    known = imagenet.load().ids
    for place, name in enumerate(known[:1000]):
        (folder / (name if "by-number" not in names else str(place))).mkdir()
    write(folder, known[0] if "by-number" not in names else "0", 1)
    write(folder, known[1] if "by-number" not in names else "1", 2)
    for name in names:
        if name != "by-number":
            write(folder, name, 9)
    test = RealSet(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.arange(2))

    def run() -> Any:
        sets = evaluation_sets([f"imagenet-v2={folder}"], test, ["goldfish", "tench"])
        return [
            (int(image[0, 0, 0]), label)
            for images, labels in sets[0].batches()
            for image, label in zip(images, labels.tolist(), strict=True)
        ]

    return Case(run, (folder.name,), right, valid=right is not NEVER)


listed(
    "folders",
    {
        "ids": ([], [(1, 1), (2, 0)]),
        "numbers": (["by-number"], [(1, 1), (2, 0)]),
        "numbers-and-hidden": (["by-number", ".ipynb_checkpoints"], [(1, 1), (2, 0)]),
        "ids-and-hidden": ([".n00000000"], [(1, 1), (2, 0)]),
        "one-too-many": (["n00000000"], NEVER),
        "numbers-and-one-too-many": (["by-number", "1000"], NEVER),
    },
    evaluation,
)
