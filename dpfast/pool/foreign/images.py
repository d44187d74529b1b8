"""Image folders: images with a metadata.jsonl, in class folders, or both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from dpfast.data.class_folders import some_of, sub_folders
from dpfast.data.pictures import UNREAD, unread
from dpfast.errors import InputError
from dpfast.labels import class_id, label_column, no_label
from dpfast.pool.foreign.intake import BATCH, OURS, Intake
from dpfast.pool.foreign.splits import by_split, choose, is_table, split_of
from dpfast.pool.tars import check_member
from dpfast.textfiles import read_json, read_json_lines

log = logging.getLogger(__name__)

CLASSES = "classes.json"  # in the folder: the names of the labels
TABLE = "metadata.jsonl"


@dataclass(frozen=True)
class Listing:
    """The images of one split.

    base: the folder that their names are relative to; rows: a table for each with its "file_name";
    columns: of a metadata.jsonl, () where there is none; where: what to call it in messages.
    """

    base: Path
    rows: list[dict[str, Any]]
    columns: Sequence[str]
    where: str

    @property
    def by_folders(self) -> bool:
        return "label" not in self.columns


def read_images(
    folder: Path,
    tables: Sequence[PurePath],
    images: Sequence[PurePath],
    split: str | None,
    intake: Intake,
    wanted: str | None,
) -> None:
    """Appends the images of the splits that ``split`` names. A metadata.jsonl among the ``tables``
    of a split names them, by "file_name", with their columns; without one they are all there are.

    The label is the column ``wanted``, "label", or where there is none the folder that an image
    lies in, if each lies in one of several folders beside each other: by their sorted names over
    all splits, as Hugging Face counts them. Raises ``InputError`` that names the file; warns of
    images that a table does not list.
    """
    if tables and all(len(file.parts) == 1 for file in tables):
        # one table above all images speaks for them
        known = _splits_of_rows(folder, tables)
        found = {
            name: [PurePath(r["file_name"]) for r in each.rows] for name, each in known.items()
        }
        chosen = choose(
            {name: files if name else list(tables) for name, files in found.items()}, split, folder
        )
        _tell_of_unlisted(
            folder / tables[0], images, {f for files in found.values() for f in files}
        )
    else:
        parts = by_split([*tables, *images], by_name=False)
        chosen = choose(parts, split, folder)
        known = {name: _listing(folder, files) for name, files in chosen.items()}
        if wanted is None and any(part.by_folders for part in known.values()):
            known |= {name: _listing(folder, parts[name]) for name in parts if name not in chosen}
        for name, files in chosen.items():
            for table in filter(lambda file: is_table(file.name), files):
                listed = {table.parent / row["file_name"] for row in known[name].rows}
                pictures = [file for file in files if file != table]
                _tell_of_unlisted(folder / table, pictures, listed)
    for name in chosen:
        part = known[name]
        if not part.rows:
            continue
        others = [other for key, other in known.items() if key != name and (key or not name)]
        _read_part(folder, part, others, intake, wanted)


def _tell_of_unlisted(table: Path, images: Sequence[PurePath], names: set[PurePath]) -> None:
    left_out = [str(file) for file in images if file not in names]
    if left_out:
        listed = some_of(left_out)
        log.warning(
            "%d images are left out, which %s does not list: %s", len(left_out), table, listed
        )


def _splits_of_rows(folder: Path, tables: Sequence[PurePath]) -> dict[str, Listing]:
    """Returns the rows of a table above all images, by the split whose name their first folder has:
    where all have one, or they name several. Else it may be that of a class.
    """
    whole = _listing(folder, tables)
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in whole.rows:
        first = PurePath(row["file_name"]).parts[0]
        ours = row.keys() >= OURS  # an export's "0466-bullet-train" is a class
        split = "" if ours else split_of(PurePath(first, "x"), by_name=False)
        parts.setdefault(split, []).append(row)
    if not parts or ("" in parts and len(parts) < 3):
        return {"": whole}
    return {split: replace(whole, rows=rows) for split, rows in parts.items()}


def _listing(folder: Path, files: Sequence[PurePath]) -> Listing:
    """Lists the images among the ``files`` of a split."""
    tables = [file for file in files if is_table(file.name)]
    if len(tables) > 1 or (tables and tables[0].name != TABLE):
        raise InputError(
            f"{str(folder)!r} holds {', '.join(map(str, tables))}: expected one {TABLE} for a split"
        )
    if tables:
        rows = _rows(folder / tables[0])
        columns = list(dict.fromkeys(name for row in rows for name in row))
        return Listing(folder / tables[0].parent, rows, columns, str(folder / tables[0]))
    for file in files:
        if file.suffix.lower() in UNREAD:
            raise unread(folder / file)
    base = folder / _base(files, folder)
    if (folder / CLASSES).is_file():
        raise InputError(f"{base / TABLE} is missing, which is beside {CLASSES} in an export")
    rows = [{"file_name": str((folder / file).relative_to(base))} for file in files]
    return Listing(base, rows, (), str(base))


def _read_part(
    folder: Path, part: Listing, others: Sequence[Listing], intake: Intake, wanted: str | None
) -> None:
    rows, where, base = part.rows, part.where, part.base
    if all(row.keys() >= OURS for row in rows):
        # ours, in the pool's order: the line of the first entropy leads the table
        rows.sort(key=lambda row: PurePath(row["file_name"]).name)
    columns = part.columns or ["file_name"]
    if wanted is None and part.by_folders:
        column, source = "label", where
        names = _class_folders(part, others)
        ids = {name: label for label, name in enumerate(names)}
        rows = [row | {"label": ids[PurePath(row["file_name"]).parts[0]]} for row in rows]
        classes: list[str] | None = names
    else:
        column, source = label_column(columns, (), wanted, where), str(folder / CLASSES)
        named = column == "label" and (folder / CLASSES).is_file()
        classes = read_json(folder / CLASSES) if named else None
    count = len(intake.name_classes(classes, source) or ()) or None
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        paths = [base / row["file_name"] for row in some]
        labels = [class_id(row.get(column), f"{where}: {row['file_name']}", count) for row in some]
        intake.image_files(
            [str(path) for path in paths],
            [_read(path) for path in paths],
            [row | {"label": label} for row, label in zip(some, labels, strict=True)],
        )


def _rows(table: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metadata.jsonl, each with the name of a file of its own."""
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
    """Returns the folder of a split, relative to ``folder``, whose sub-folders are classes."""
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


def _class_folders(part: Listing, others: Sequence[Listing]) -> list[str]:
    """Returns the sorted names of the folders that the images lie in, over a split and the
    ``others``.

    Those of another split count where all its images lie in folders, and one folder alone, which
    may as well be called "images", where it is one of others. Raises ``InputError`` where an image
    of ``part`` lies elsewhere, or a folder beside holds none and would be no class.
    """
    parts = [PurePath(row["file_name"]).parts for row in part.rows]
    own = {names[0] for names in parts}
    odd = next((names for names in parts if len(names) != 2), None)
    known = {
        name for each in (part, *others) if len(own_of := _folders(each)) > 1 for name in own_of
    }
    if odd is not None or not own <= known:
        if odd is None:
            found = f"all lie in {parts[0][0]!r}"
        else:
            found = f"{str(PurePath(*odd))!r} lies {'in none' if len(odd) == 1 else 'deeper'}"
        said = "its images do not lie in several class folders beside each other"
        if part.columns:
            raise no_label(None, part.columns, part.where, f", and {said}: {found}")
        raise InputError(
            f"{part.where}: no label; {said}: {found}; expected CLASS/IMAGE for all, or a {TABLE}"
        )
    for beside in sub_folders(part.base) if not part.columns else ():
        if beside.name not in known and not beside.name.startswith("__"):
            raise InputError(
                f"{beside}: holds no image, and would be no class; fill it or remove it"
            )
    return sorted(known)


def _folders(part: Listing) -> set[str]:
    """Returns the folders that the images lie in, if each lies in one; none otherwise."""
    parts = [PurePath(row["file_name"]).parts for row in part.rows]
    return {names[0] for names in parts} if all(len(names) == 2 for names in parts) else set()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
