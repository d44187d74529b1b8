"""Text files: always UTF-8, whatever the locale, with lines that end at a line feed and nothing
else.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpfast.errors import InputError, UnreadableError

# what editors and shells of Windows write first; UTF-32's little-endian mark begins with UTF-16's
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    """Reads the text of a file in UTF-8, with or without its byte order mark.

    Raises ``InputError`` with the path for another encoding, ``UnreadableError`` for a file that
    may not be read, and ``FileNotFoundError`` where there is none.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a null byte in its name
        raise UnreadableError(f"{str(path)!r}: cannot be read: {error}") from None
    return _decoded(data, str(path))


def _decoded(data: bytes, where: str) -> str:
    """Returns the text of bytes in UTF-8. Raises ``InputError`` that begins with ``where`` for
    others.
    """
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise InputError(f"{where}: its encoding is {encoding}; save it as UTF-8")
    if b"\0" in data:
        raise InputError(
            f"{where}: holds null bytes, as UTF-16 and binary files do; save it as UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{where}, line {line}: byte 0x{data[error.start]:02x} is no UTF-8; save it as UTF-8"
        ) from None


def lines(text: str) -> list[str]:
    """Returns the lines of a text. Only a line feed (with or without a carriage return) ends one:
    ``str.splitlines`` also splits at U+2028, U+0085 and six more, which captions hold.
    """
    found = [line.removesuffix("\r") for line in text.split("\n")]
    return found[:-1] if found[-1] == "" else found


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises ``InputError`` with the path and line for what is none; else as
    ``read_text``.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Reads a text in JSON; bytes are UTF-8. Raises ``InputError`` that begins with ``where`` for
    what is none, and for a name that stands twice in one table: Python takes the last one, others
    the first.
    """
    if isinstance(text, bytes):
        text = _decoded(text, where)
    try:
        return json.loads(text, object_pairs_hook=_table)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot be read as JSON: {error}") from None


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{next(n for n in names if names.count(n) > 1)!r} stands in it twice")
    return table


def read_whole_json(path: Path) -> Any:
    """Reads a JSON file; returns None where there is no file, or one that is no JSON, as a kill may
    leave it. Raises ``UnreadableError`` for one that may not be read.
    """
    try:
        return read_json(path)
    except UnreadableError:
        raise
    except (FileNotFoundError, InputError):
        return None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number, from 1, and the table of each line of a .jsonl file; empty lines are
    passed over.

    Raises ``InputError`` with the path and line for one that holds no table; else as ``read_text``.
    """
    for number, line in enumerate(lines(read_text(path)), 1):
        if not line.strip():
            continue
        table = parse_json(line, f"{path}, line {number}")
        if not isinstance(table, dict):
            raise InputError(f"{path}, line {number}: holds no table of names and values")
        yield number, table


class Kind(NamedTuple):
    """The kind of a table's value. holds: whether a value is of it; words: what is expected."""

    holds: Callable[[Any], bool]
    words: str

    def or_null(self) -> Kind:
        """Returns the same, or null."""
        return Kind(lambda value: value is None or self.holds(value), f"{self.words} or null")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


TEXT = Kind(lambda value: isinstance(value, str), "a text")
FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
TABLE = Kind(lambda value: isinstance(value, dict), "a table")
NUMBER = Kind(_is_number, "a number")
WHOLE = Kind(
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "a whole number of at least 0",
)
COUNT = Kind(lambda value: WHOLE.holds(value) and value > 0, "a whole number of at least 1")
SHARE = Kind(lambda value: _is_number(value) and 0 <= value <= 1, "a share, 0 to 1")


def rows_of(kind: Kind, least: int = 0) -> Kind:
    """Returns a list of values of one kind, at least so many."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= least and all(map(kind.holds, value))

    return Kind(holds, f"a list of {least or 'any'} or more, each {kind.words}")


def check_table(
    table: dict[str, Any],
    where: str,
    kinds: Mapping[str, Kind],
    known: Mapping[str, Kind] | None = None,
) -> None:
    """Raises ``InputError`` that begins with ``where`` for a value that is missing or of another
    kind. known: values that may be missing.
    """
    for name, kind in {**kinds, **(known or {})}.items():
        if name not in table:
            if name in kinds:
                raise InputError(f"{where}: has no {name!r}; expected {kind.words}")
        elif not kind.holds(table[name]):
            raise InputError(f"{where}: {name} = {table[name]!r}: expected {kind.words}")


def to_json(value: Any) -> str:
    """Returns JSON in one line, which strict parsers read: a number that is not finite is null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
