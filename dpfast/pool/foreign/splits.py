"""Which files of a folder are data, and of which split: the names that Hugging Face uses, so that
what ``datasets`` calls "train" is "train" here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from dpfast.data.pictures import SUFFIXES as PICTURES
from dpfast.errors import InputError
from dpfast.files import below
from dpfast.pool.tars import is_hidden

KEYWORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SHARDED = re.compile(r"(\w+)-\d{5}-of-\d{5}\b.*")  # train-00000-of-00003.parquet
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # beside images
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def data_files(folder: Path) -> dict[str, list[PurePath]]:
    """What lies in ``folder`` at any depth, by kind: "parquet", "tar", "packed" archives, "arrow"
    files, "table"s of images, and "image"s; each sorted, relative to ``folder``.

    Hidden files and folders are no data. Links are followed (``dpfast.files.below``).
    """
    found: dict[str, list[PurePath]] = {}
    for file in below(folder):
        path = file.relative_to(folder)
        if (kind := _kind(path.name)) and not is_hidden(path):
            found.setdefault(kind, []).append(path)
    return {kind: sorted(paths) for kind, paths in found.items()}


def _kind(name: str) -> str | None:
    lower = name.lower()
    if name in TABLES:
        return "table"
    if lower.endswith(PACKED):
        return "packed"
    if lower.endswith(".arrow"):
        return "arrow"
    if lower.endswith((".parquet", ".tar")):
        return lower.rpartition(".")[2]
    return "image" if lower.endswith(PICTURES) else None


def split_of(path: PurePath, *, by_name: bool = True) -> str:
    """The split that a file belongs to: by a folder above it, else by its own name where
    ``by_name``; "" for none.
    """
    for part in path.parts[:-1]:
        if found := _keyword(part):
            return found
    if not by_name:
        return ""
    sharded = SHARDED.fullmatch(path.name)
    if sharded and not _keyword(sharded[1]):
        return sharded[1]
    return _keyword(path.name.partition(".")[0] if sharded is None else sharded[1])


def _keyword(name: str) -> str:
    """The one split whose keyword is a word of ``name``, or ""."""
    words = {KEYWORDS[word] for word in re.split(r"[-._ 0-9]+", name) if word in KEYWORDS}
    return words.pop() if len(words) == 1 else ""


def choose(
    paths: Iterable[PurePath], split: str | None, folder: Path, *, by_name: bool = True
) -> dict[str, list[PurePath]]:
    """The files of the splits that ``split`` names ("train", "train+test"), in its order; all of
    them where there is only one.

    Raises ``InputError`` that lists the splits where there are several and none is named, and for
    one that is not there: they are never merged without being asked.
    """
    found: dict[str, list[PurePath]] = {}
    for path in paths:
        found.setdefault(split_of(path, by_name=by_name), []).append(path)
    listed = ", ".join(
        f"{name!r} ({len(files)} files)" if name else f"none ({files[0]} and others)"
        for name, files in sorted(found.items())
    )
    if split is None:
        if len(found) > 1:
            raise InputError(
                f"{str(folder)!r} holds the splits {listed}; choose by --split NAME, or NAME+NAME "
                "for several"
            )
        return found
    chosen = {}
    for asked in split.split("+"):
        name = asked.strip()
        name = name if name in found else KEYWORDS.get(name, name)
        if not name or name not in found:
            raise InputError(f"split = {split!r}: {str(folder)!r} holds the splits {listed}")
        chosen[name] = found[name]
    return chosen
