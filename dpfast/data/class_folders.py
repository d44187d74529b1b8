"""The one place that decides which folder is which class.

A folder may be called
    by its class's name                     "Dress", "T-shirt"
    by the name with other case, or with    "dress", "T-shirt-top"
    "-" or "_" for what is no letter    "Ankle_boot"
    or digit
    as ``dpfast export`` calls it           "0007-Sneaker"
    by the class id                         "7", where no class has a number for its name
and where the classes are ImageNet's
    by the WordNet id                       "n01440764"
    by the index into ImageNet's 1,000      "0", in place of the class id

Names that are exactly those of classes are taken first, whatever else they could mean. The rest
must be unambiguous: a folder that may be two classes is refused, and so are two folders of one
class. Names are compared as Unicode's NFC: a Mac writes "é" as two characters.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dpfast import imagenet
from dpfast.config import RECIPE_FILE
from dpfast.errors import InputError
from dpfast.files import is_folder, listed

LONGEST = 255  # bytes of a file's name
SHOWN = 10  # names in a message


def sub_folders(path: Path) -> list[Path]:
    """Returns the folders in a folder, sorted; hidden ones are no data. Raises
    ``UnreadableError``.
    """
    return [entry for entry in listed(path) if entry.is_dir()]


def holds_classes(path: Path) -> bool:
    """Returns True if a path is a folder with sub-folders and no run: it then goes before what is
    embedded under the same name.
    """
    return is_folder(path) and not (path / RECIPE_FILE).is_file() and bool(sub_folders(path))


class ClassNames:
    """The names that each class may be called by.

    classes: names, by id; ids: their WordNet ids where they are ImageNet's, else None.
    """

    def __init__(self, classes: Sequence[str], ids: Sequence[str] | None = None) -> None:
        self.classes = classes
        self._exact: dict[str, set[int]] = {}
        self._other: dict[str, set[int]] = {}
        numbers = any(name.strip().isdecimal() for name in classes)
        order = {wordnet_id: index for index, wordnet_id in enumerate(imagenet.load().ids)}
        for label, name in enumerate(classes):
            name = unicodedata.normalize("NFC", name)
            self._exact.setdefault(name, set()).add(label)
            others = [name, safe_name(name), folder_name(label, name)]
            if ids is not None:
                others += [ids[label], str(order[ids[label]])]
            elif not numbers:
                others.append(str(label))
            for other in others:
                self._other.setdefault(other.casefold(), set()).add(label)

    def called(self, name: str) -> list[int]:
        """Returns the classes that may be meant by a name in NFC, rising: those that have exactly
        this one, else all that may be called so.
        """
        folded = name.casefold()
        return sorted(
            self._exact.get(name)
            or self._other.get(folded)
            or self._other.get(folded.replace("_", "-"), set())
        )

    def several(self, labels: Sequence[int]) -> str:
        """Returns classes in words, for a message."""
        return ", ".join(f"{self.classes[label]!r} (class {label})" for label in labels)


def class_folders(
    path: Path,
    classes: Sequence[str],
    *,
    ids: Sequence[str] | None,
    only: bool = False,
    field: str = "folder",
) -> list[tuple[Path, int]]:
    """Returns the sub-folders of ``path`` with their class ids, sorted by path.

    Args:
        path: the folder.
        classes: names of the classes, by id.
        ids: the WordNet ids of ``classes`` where they are ImageNet's, else None.
        only: leaves out the other classes of ImageNet, instead of refusing them.
        field: what the caller calls ``path``, for the messages of errors.

    Raises ``InputError`` for folders of no class, a folder of two classes and two folders of one,
    which it names.
    """
    names = ClassNames(classes, ids)
    left_out = set() if ids is None or not only else {*imagenet.load().ids, *map(str, range(1000))}
    found: dict[int, Path] = {}
    unknown = []
    for folder in sub_folders(path):
        name = text_of(folder.name)
        labels = names.called(name)
        if not labels:
            if name not in left_out:
                unknown.append(folder.name)
            continue
        if len(labels) > 1:
            raise InputError(
                f"{field} = {str(path)!r}: the sub-folder {folder.name!r} may be any of "
                f"{names.several(labels)}; expected the name of one"
            )
        (label,) = labels
        if label in found:
            raise InputError(
                f"{field} = {str(path)!r}: the sub-folders {found[label].name!r} and "
                f"{folder.name!r} are both class {label}, {classes[label]!r}; expected one"
            )
        found[label] = folder
    if unknown:
        raise InputError(
            f"{field} = {str(path)!r}: classes that the learner does not know: "
            f"{some_of(unknown)}; expected {_expected(unknown, classes, ids)}"
        )
    return sorted((folder, label) for label, folder in found.items())


def _expected(unknown: Sequence[str], classes: Sequence[str], ids: Sequence[str] | None) -> str:
    """Says what folders of no class should be called: by the classes' names, and where they are
    called as ImageNet's, why that calls no class here.
    """
    known = imagenet.load()
    strangers = [] if ids is not None else known.strangers(classes)
    imagenet_s = {*known.ids, *known.names, *map(str, range(len(known.ids)))}
    if imagenet_s.isdisjoint(unknown) or not 0 < len(strangers) < len(classes):
        return f"names of classes: {some_of([repr(name) for name in classes])}"
    others = f" and {len(strangers) - 1} more are" if len(strangers) > 1 else " is"
    return (
        f"names of classes: WordNet ids and indices call them only where all class_names are of "
        f"ImageNet, and {strangers[0]!r}{others} not: a prompt of your own for a class belongs "
        "into --prompts FILE, beside its name"
    )


def imagenet_ids(path: Path, classes: Sequence[str]) -> tuple[str, ...] | None:
    """Returns the WordNet ids of ``classes``; None where they are not ImageNet's.

    None also where a name belongs to two of ImageNet's classes ("crane") and the sub-folders of
    ``path`` are called exactly by the names of ``classes``, so that no id is needed. Raises
    ``InputError`` for such a name otherwise.
    """
    try:
        return imagenet.load().ids_of(classes)
    except InputError:
        exact = {unicodedata.normalize("NFC", name) for name in classes}
        if all(text_of(folder.name) in exact for folder in sub_folders(path)):
            return None
        raise


def wordnet_ids(path: Path) -> frozenset[str]:
    """Returns the WordNet ids that the sub-folders of ``path`` are called by, or that their indices
    into ImageNet's 1,000 stand for, as ImageNet-V2 has them; other sub-folders are not looked at.
    """
    known = imagenet.load().ids
    by_index = {str(index): wordnet_id for index, wordnet_id in enumerate(known)}
    names = [folder.name for folder in sub_folders(path)]
    return frozenset(
        by_index.get(name, name)
        for name in names
        if name in by_index or imagenet.WORDNET_ID.fullmatch(name)
    )


def folder_name(label: int, name: str) -> str:
    """Returns the name that ``dpfast export`` gives the folder of a class, at most 255 bytes as
    file systems have it: "0007-Sneaker".
    """
    return f"{label:04d}-{safe_name(name)}".encode()[:LONGEST].decode(errors="ignore")


def safe_name(name: str) -> str:
    """Returns a name with "-" for what is neither letter nor digit, so that it can be part of a
    file's.
    """
    return "".join(c if c.isalnum() else "-" for c in unicodedata.normalize("NFC", name))


def text_of(name: str) -> str:
    """Returns the text of a file's name, which is UTF-8 whatever the locale, as NFC."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def some_of(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
