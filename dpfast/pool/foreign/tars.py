"""webdataset shards that need not be ours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpfast.data.pictures import SUFFIXES as PICTURES
from dpfast.errors import InputError
from dpfast.labels import class_id, class_id_in_text, no_label, shortened
from dpfast.pool.foreign.intake import BATCH, Intake
from dpfast.pool.shards import npy_array
from dpfast.pool.tars import TarSample, read_tar
from dpfast.textfiles import parse_json

PAYLOADS = ("npy", *(suffix.removeprefix(".") for suffix in PICTURES))


def read_tars(paths: Iterable[Path], intake: Intake, label_column: str | None) -> None:
    """Appends the samples of ``paths``: of each the one member that is an image or an array, and a
    label.

    The label is ``.cls``, else "label" of the ``.json``; or ``label_column``, a member of that
    suffix or a name in the ``.json``. Raises ``InputError`` that names file and sample.
    """
    for path in paths:
        samples = read_tar(path)
        while part := list(itertools.islice(samples, BATCH)):
            items = [_item(sample, path, label_column) for sample in part]
            # images and arrays by turns end in an error, which names the first that differs
            for arrays, group in itertools.groupby(items, lambda item: item[0].endswith(".npy")):
                names, files, rows = zip(*group, strict=True)
                if arrays:
                    intake.arrays(names, list(map(npy_array, files, names)), rows)
                else:
                    intake.image_files(names, files, rows)


def _item(sample: TarSample, path: Path, wanted: str | None) -> tuple[str, bytes, dict[str, Any]]:
    """Returns the name of a sample's image or array, its bytes, and its columns."""
    suffix = _payload(sample, path)
    return f"{path}: {sample.key}.{suffix}", sample.read(suffix), _row(sample, path, wanted)


def _payload(sample: TarSample, path: Path) -> str:
    found = [suffix for suffix in sample.members if suffix in PAYLOADS]
    if len(found) == 1:
        return found[0]
    what = "has none of" if not found else "has several of"
    raise InputError(
        f"{path}: sample {sample.key!r} {what} {', '.join(PAYLOADS)}; its members are "
        f"{', '.join(sample.members)}"
    )


def _row(sample: TarSample, path: Path, wanted: str | None) -> dict[str, Any]:
    """Returns the columns of a sample, with its "label"."""
    where = f"{path}: sample {sample.key!r}"
    row: dict[str, Any] = {}
    if "json" in sample.members:
        row = parse_json(sample.read("json"), f"{path}: {sample.key}.json")
        if not isinstance(row, dict):
            raise InputError(f"{path}: the .json of sample {sample.key!r} is no table")
    member, column = ("cls", "label") if wanted is None else (wanted.removeprefix("."), wanted)
    # null is no label, and where no place was named none that hides another
    in_row = column in row and (wanted is not None or row[column] is not None)
    if member not in sample.members and not in_row:
        raise no_label(wanted, [*(f".{suffix}" for suffix in sample.members), *row], where)
    if member not in sample.members:
        return row | {"label": class_id(row[column], f"{where}, .json")}
    label = class_id_in_text(sample.read(member), f"{where}, .{member}")
    if not _agrees(row.get(column), label):
        other = shortened(row[column])
        raise InputError(f"{where}: its .{member} is {label}, {column!r} of its .json is {other}")
    return row | {"label": label}


def _agrees(value: object, label: int) -> bool:
    """Returns True if a value beside a label says nothing else: there is none, it is the same
    number, also as text, or a text that is no number, which names the class.
    """
    if isinstance(value, str):
        try:
            return float(value) == label
        except ValueError:
            return True
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value == label
    )
