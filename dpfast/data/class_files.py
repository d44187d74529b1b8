"""Files that say a value of classes, such as a count or a strength of guidance.

A line is a class and its value, after white space or a comma, the class by its name or by its id::

    0 1280
    1,24
    tree frog 5
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dpfast.errors import LARGEST, InputError
from dpfast.textfiles import lines, read_text

T = TypeVar("T")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")


def class_rows(
    field: str, file: str, value: str, parsed: Callable[[str], T | None], wanted: str
) -> dict[str, T]:
    """Maps each class, as the file calls it, to its value, in the order of the lines.

    field: what names the file. value: what a line says of its class, such as "count"; parsed: the
    value of a text, None where it is none; wanted: what it would have to be, in words.

    Raises ``InputError`` with the file and line where there is no file, for a line of another form,
    a value that is none, and a class that comes twice.
    """
    try:
        text = read_text(Path(file))
    except FileNotFoundError:
        raise InputError(f"{field} = {file!r}: no such file") from None
    found: dict[str, T] = {}
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        where = f"{field} = {file!r}, line {number}"
        row = re.fullmatch(r"\s*(\S.*?)(?:\s*,\s*|\s+)([^\s,]+)\s*", line)
        if row is None:
            raise InputError(f"{where}: {line.strip()[:60]!r}: expected a class and its {value}")
        name, said = row.groups()
        if name in found:
            raise InputError(f"{where}: class {name!r} stands in it twice")
        each = parsed(said)
        if each is None:
            raise InputError(
                f"{where}: the {value} of {name!r} is {said[:60]!r}, expected {wanted}"
            )
        found[name] = each
    return found


def by_label(field: str, file: str, rows: dict[str, T], classes: Sequence[str]) -> dict[int, T]:
    """Maps labels to the values of the rows of a file. A class whose name is a number is meant
    before the class with that id.

    Raises ``InputError`` for a class that is not known or comes twice under two names.
    """
    found: dict[int, T] = {}
    for name, value in rows.items():
        label = _label(name, classes, f"{field} = {file!r}")
        if label in found:
            raise InputError(
                f"{field} = {file!r}: class {label} ({classes[label]!r}) stands in it twice"
            )
        found[label] = value
    return found


def strength_rows(field: str, file: str, low: float = -math.inf) -> dict[str, float]:
    """Maps each class, as the file calls it, to a finite number of at least ``low``. Raises
    ``InputError`` as ``class_rows`` does.
    """

    def parsed(text: str) -> float | None:
        number = float(text) if NUMBER.fullmatch(text) else math.nan
        return number if low <= number and abs(number) <= LARGEST else None

    least = "" if low == -math.inf else f" of at least {low:g}"
    wanted = f"a {'' if least else 'finite '}number{least}, of float32"
    return class_rows(field, file, "value", parsed, wanted)


def class_strengths(
    field: str, file: str, classes: Sequence[str], low: float = -math.inf
) -> dict[int, float]:
    """Maps the labels of the classes that a file names to finite numbers of at least ``low``; {}
    without a file. Raises ``InputError`` as ``strength_rows`` and ``by_label`` do, and for a file
    that names none.
    """
    if not file:
        return {}
    rows = strength_rows(field, file, low)
    if not rows:
        raise InputError(f"{field} = {file!r}: names no class; expected at least one")
    return by_label(field, file, rows, classes)


def _label(name: str, classes: Sequence[str], field: str) -> int:
    named = [label for label, each in enumerate(classes) if each == name]
    if len(named) > 1:
        raise InputError(f"{field}: {name!r} names classes {named[0]} and {named[1]}; say the id")
    if named:
        return named[0]
    if re.fullmatch(r"[0-9]{1,10}", name) and int(name) < len(classes):
        return int(name)
    raise InputError(
        f"{field}: {name[:60]!r} is no class; expected a name, or an id from 0 to "
        f"{len(classes) - 1}"
    )
