"""The files of a folder that are data, and their splits: the names that Hugging Face uses, so that
what ``datasets`` calls "train" is "train" here. In any case of letters: "Train.parquet" and
"Test.parquet" are one split to ``datasets``, and merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from dpfast.data.pictures import SUFFIXES as PICTURES
from dpfast.data.pictures import UNREAD
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
    "trainset": "train",
    "valset": "validation",
    "devset": "validation",
    "testset": "test",
}
SHARDED = re.compile(r"(\w+)-\d{5}-of-\d{5}\b.*")  # train-00000-of-00003.parquet
NUMBERED = re.compile(r"(.*?)-?(\d+)-of-(\d+)(?!\d)")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # beside images
# what may hold labels too, and is not read
OTHER_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".xml", ".mat")
ABOUT = (
    *("classes.json", "config.json", "dataset_dict.json", "dataset_info.json"),
    "dataset_infos.json",
)  # and have no labels
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def data_files(folder: Path) -> dict[str, list[PurePath]]:
    """Lists the files in ``folder`` at any depth, by kind: "parquet", "tar", "packed" archives,
    "arrow" files, "table"s of images, "image"s (also in formats that are not read), and "other"
    tables; each sorted, relative to ``folder``.

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
    if is_table(name):
        return "table"
    if lower.endswith(PACKED):
        return "packed"
    if lower.endswith(".arrow"):
        return "arrow"
    if lower.endswith((".parquet", ".tar")):
        return lower.rpartition(".")[2]
    if lower.endswith((*PICTURES, *UNREAD)):
        return "image"
    text = lower.endswith(".txt") and ("label" in lower or "annotation" in lower)
    return "other" if (text or lower.endswith(OTHER_TABLES)) and lower not in ABOUT else None


def is_table(name: str) -> bool:
    """Returns True if a file is one of ``TABLES``, in any case of letters."""
    return name.lower() in TABLES


def split_of(path: PurePath, *, by_name: bool = True) -> str:
    """Returns the split that a file belongs to: by a folder above it, else by its own name where
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
    """Returns the one split whose keyword is a word of ``name``, or ""."""
    words = {KEYWORDS[word] for word in _words(name) if word in KEYWORDS}
    return words.pop() if len(words) == 1 else ""


def _words(name: str) -> list[str]:
    return re.split(r"[-._ 0-9]+", name.lower())


def by_split(paths: Iterable[PurePath], *, by_name: bool = True) -> dict[str, list[PurePath]]:
    """Returns the files of each split, as ``split_of`` has it, in their order."""
    found: dict[str, list[PurePath]] = {}
    for path in paths:
        found.setdefault(split_of(path, by_name=by_name), []).append(path)
    return found


def check_shards(files: Iterable[PurePath], folder: Path) -> None:
    """Raises ``InputError`` for files of one split that may be several ("mnisttrain.parquet" and
    "mnisttest.parquet"), and where one of those that number each other is missing or stands twice
    ("train-00001-of-00003.parquet").
    """
    hinted: dict[str, PurePath] = {}
    numbered: dict[tuple[PurePath, str, str], list[int]] = {}
    for file in files:
        for word in _words(file.name) if not split_of(file) else ():
            for key in ("train", "val", "dev", "test", "eval"):
                if word.startswith(key) or word.endswith(key):
                    hinted.setdefault(KEYWORDS[key], file)
        if found := NUMBERED.match(file.name):
            shards = numbered.setdefault((file.parent, found[1], found[3]), [])
            shards.append(int(found[2]))
    if len(hinted) > 1:
        listed = " and ".join(str(folder / file) for file in hinted.values())
        raise InputError(
            f"{listed} may be of several splits: call them train-NAME, test-NAME, or put them into "
            "folders train, test"
        )
    for (parent, name, total), numbers in numbered.items():
        first = 1 if int(total) in numbers and 0 not in numbers else 0
        whole = range(first, first + int(total))
        if sorted(numbers) == list(whole):
            continue
        odd = next((n for n in numbers if numbers.count(n) > 1 or n not in whole), None)
        missing = next(n for n in whole if n not in numbers) if odd is None else odd
        shard = f"{name}-{missing:0{len(total)}d}-of-{total}".removeprefix("-")
        what = "is missing" if odd is None else "stands in it twice, or is none of them"
        raise InputError(f"{folder / parent / shard} {what}")


def choose(
    found: Mapping[str, list[PurePath]], split: str | None, folder: Path
) -> dict[str, list[PurePath]]:
    """Returns the files of the splits that ``split`` names ("train", "train+test"), in its order;
    all of them where there is only one. found: of each split its files, "" for none.

    Raises ``InputError`` that lists the splits where there are several and none is named, and for
    one that is not there: they are never merged without being asked.
    """
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
        return dict(found)
    chosen = {}
    for asked in split.split("+"):
        name = asked.strip()
        name = name if name in found else KEYWORDS.get(name.lower(), name)
        if not name or name not in found:
            raise InputError(f"split = {split!r}: {str(folder)!r} holds the splits {listed}")
        chosen[name] = found[name]
    return chosen
