"""Files of records, a line of JSON for each, and of pictures: looked at before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpfast.errors import InputError
from dpfast.files import is_folder, there
from dpfast.textfiles import Kind, check_table, read_json_lines

Record = dict[str, Any]


def read_records(
    path: Path,
    kinds: Mapping[str, Kind],
    known: Mapping[str, Kind] | None = None,
    *,
    needed: bool = False,
) -> list[Record]:
    """The lines of a file of records; [] where there is none.

    needed: whether that is an error.

    Raises ``InputError`` for a path that is none of a file, and with the line for values as
    ``check_table``.
    """
    check_file("results", path)
    if not there(path):
        if needed:
            raise InputError(f"results = {str(path)!r}: no such file")
        return []
    numbered = list(read_json_lines(path))
    for number, line in numbered:
        check_table(line, f"{path}, line {number}", kinds, known)
    return [line for _, line in numbered]


def check_file(option: str, path: Path) -> None:
    """Raises ``InputError`` where a file of this path can neither be nor be made."""
    if is_folder(path):
        raise InputError(f"{option} = {str(path)!r}: is a folder, expected a file")
    around = next((folder for folder in path.absolute().parents if there(folder)), None)
    if around is not None and not around.is_dir():
        raise InputError(f"{option} = {str(path)!r}: {str(around)!r} is no folder")


def check_appendable(option: str, path: Path) -> None:
    """Raises ``InputError`` where nothing can be appended to a file of this path."""
    check_file(option, path)
    place = next(each for each in (path.absolute(), *path.absolute().parents) if there(each))
    if not os.access(place, os.W_OK):
        raise InputError(f"{option} = {str(path)!r}: {str(place)!r} may not be written")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record and prints its line. It is written at once, so that a kill tears none."""
    line = json.dumps(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
    print(line, flush=True)


def check_picture(option: str, path: Path) -> None:
    """Raises ``InputError`` where no picture of this path can be drawn."""
    from matplotlib.figure import Figure

    check_file(option, path)
    endings = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in endings:
        wanted = ", ".join(f".{ending}" for ending in endings)
        raise InputError(f"{option} = {str(path)!r}: expected a name that ends in {wanted}")
    if not is_folder(path.parent):
        raise InputError(f"{option} = {str(path)!r}: no folder {str(path.parent)!r}")
