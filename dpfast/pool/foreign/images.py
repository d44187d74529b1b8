"""Image folders: images with a metadata.jsonl, in class folders, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from dpfast.errors import InputError
from dpfast.labels import class_id, label_column, no_label
from dpfast.pool.foreign.intake import BATCH, OURS, Intake
from dpfast.pool.foreign.splits import split_of
from dpfast.pool.tars import check_member
from dpfast.textfiles import read_json, read_json_lines

CLASSES = "classes.json"  # in the folder: the names of the labels
TABLE = "metadata.jsonl"


def read_images(
    folder: Path, files: Sequence[PurePath], intake: Intake, wanted: str | None
) -> None:
    """Appends the images of one split. A metadata.jsonl among its ``files`` names them, by
    "file_name", with their columns; without one they are all there are.

    The label is the column ``wanted``, "label", or where there is none the folder that an image
    lies in, if each lies in one of several folders beside each other: by their sorted names, as
    Hugging Face and torchvision count them. Raises ``InputError`` that names the file.
    """
    tables = [file for file in files if file.name.startswith("metadata.")]
    if len(tables) > 1 or (tables and tables[0].name != TABLE):
        raise InputError(
            f"{str(folder)!r} holds {', '.join(map(str, tables))}: expected one {TABLE} for a split"
        )
    if tables:
        base = folder / tables[0].parent
        rows, where = _rows(folder / tables[0]), str(folder / tables[0])
    else:
        base = folder / _base(files, folder)
        where = str(base)
        if (folder / CLASSES).is_file():
            raise InputError(f"{base / TABLE} is missing, which is beside {CLASSES} in an export")
        rows = [{"file_name": str((folder / file).relative_to(base))} for file in files]
    if not rows:
        return
    if all(row.keys() >= OURS for row in rows):
        # ours, in the pool's order: the line of the first entropy leads the table
        rows.sort(key=lambda row: PurePath(row["file_name"]).name)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if wanted is None and "label" not in columns:
        column, source = "label", where
        names = _class_folders(rows, columns if tables else (), where)
        ids = {name: label for label, name in enumerate(names)}
        rows = [row | {"label": ids[PurePath(row["file_name"]).parts[0]]} for row in rows]
        classes: list[str] | None = names
    else:
        column, source = label_column(columns, (), wanted, where), str(folder / CLASSES)
        named = column == "label" and (folder / CLASSES).is_file()
        classes = read_json(folder / CLASSES) if named else None
    count = len(intake.name_classes(classes, source) or ()) or None
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        paths = [base / row["file_name"] for row in part]
        labels = [class_id(row.get(column), f"{where}: {row['file_name']}", count) for row in part]
        intake.image_files(
            [str(path) for path in paths],
            [_read(path) for path in paths],
            [row | {"label": label} for row, label in zip(part, labels, strict=True)],
        )


def _rows(table: Path) -> list[dict[str, Any]]:
    """The lines of a metadata.jsonl, each with the name of a file of its own."""
    rows = []
    seen = set()
    for line, row in read_json_lines(table):
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise InputError(
                f"{table}, line {line}: it has no file_name; its columns are {', '.join(row)}"
            )
        check_member(name, f"{table}, line {line}")
        if PurePath(name) in seen:  # "./0.png" is "0.png"
            raise InputError(f"{table}, line {line}: the file_name {name!r} stands in it twice")
        seen.add(PurePath(name))
        rows.append(row)
    return rows


def _base(files: Sequence[PurePath], folder: Path) -> PurePath:
    """The folder of a split, relative to ``folder``, whose sub-folders are classes."""
    bases = {_split_folder(file) for file in files}
    if len(bases) > 1:
        listed = ", ".join(sorted(str(folder / base) for base in bases))
        raise InputError(f"the images of one split lie in several folders: {listed}; name one")
    return bases.pop()


def _split_folder(file: PurePath) -> PurePath:
    for place in range(1, len(file.parts)):
        if split_of(PurePath(*file.parts[:place], "x"), by_name=False):
            return PurePath(*file.parts[:place])
    return PurePath()


def _class_folders(rows: Sequence[dict[str, Any]], columns: Sequence[str], where: str) -> list[str]:
    """The sorted names of the folders that the images lie in.

    Raises ``InputError`` where one lies elsewhere, or all in one folder, which may as well be
    called "images".
    """
    parts = [PurePath(row["file_name"]).parts for row in rows]
    names = sorted({part[0] for part in parts})
    if len(names) < 2 or any(len(part) != 2 for part in parts):
        besides = ", and its images do not lie in several class folders beside each other"
        raise no_label(None, columns, where, besides)
    return names


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
