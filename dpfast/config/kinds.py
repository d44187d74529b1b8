"""The types that a recipe's field may have: how a value is read, and what is said of it.

A value comes from Python, from TOML or as the text of a command line.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
import typing
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NewType

from dpfast.config.imported import FORM, is_import_path
from dpfast.errors import LARGEST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LEVELS = 20  # of a recipe's tables and lists: a model's options may be nested, no one's so deeply
BELOW = 1e300  # numbers of a table: Python writes no whole ones of more than 4,300 digits
BARE = re.compile("[A-Za-z0-9_-]+")  # a key without quotes
ITEM = re.compile(  # of a list on a command line
    r'\s*(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<plain>(?!")[^,]*?))\s*(?P<more>,|\Z)'
)
ImportPath = NewType("ImportPath", str)  # the form of dpfast/config/imported.py


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between bounds, of which low and high belong to it, above and below do not."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"between {self.low:.16g} and {self.high:.16g}"
        bounds = {
            "at least": self.low,
            "above": self.above,
            "at most": self.high,
            "below": self.below,
        }
        return " and ".join(f"{word} {x:.16g}" for word, x in bounds.items() if x is not None)


class Kind(ABC):
    """The values of one type."""

    @abstractmethod
    def parse(self, given: Any) -> Any:
        """Returns ``given`` as this type.

        Raises ``TypeError``, ``ValueError`` or ``OverflowError`` where it is not.
        """

    @abstractmethod
    def words(self, range: Range) -> str:
        """Returns the expected values in words: "a whole number of at least 1"."""

    @abstractmethod
    def placeholder(self, unit: str) -> str:
        """Returns the text that stands for a value on a command line: ``unit`` where there is
        one.
        """

    def plural(self, range: Range) -> str:
        """Returns the expected items of a list in words."""
        return self.words(range)

    def within(self, value: Any, range: Range) -> bool:
        """Returns True if the numbers of a parsed value are in the range."""
        return True


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, which float32 holds. type: int or float."""

    type: type[int] | type[float]

    def parse(self, given: Any) -> Any:
        number = math.nan if isinstance(given, bool) else float(given)
        if not math.isfinite(number) or self.type(number) != number:
            raise ValueError
        if abs(number) > LARGEST:
            raise OverflowError
        # as it was given, where the type is right: a float holds whole numbers until 2**53 alone
        return given if type(given) is self.type else self.type(number)

    def words(self, range: Range) -> str:
        return f"a {self.plural(range).replace('numbers', 'number')}"

    def plural(self, range: Range) -> str:
        bounds = str(range)
        noun = "whole numbers" if self.type is int else "numbers" if bounds else "finite numbers"
        return f"{noun}{' of' if bounds.startswith('at') else ''} {bounds}".rstrip()

    def placeholder(self, unit: str) -> str:
        return unit or ("N" if self.type is int else "X")

    def within(self, value: Any, range: Range) -> bool:
        return value in range


class Truth(Kind):
    """True or false."""

    TEXTS: typing.ClassVar = {"true": True, "false": False, "1": True, "0": False}

    def parse(self, given: Any) -> bool:
        value = self.TEXTS.get(given.lower()) if isinstance(given, str) else given
        if not isinstance(value, bool):
            raise TypeError
        return value

    def words(self, range: Range) -> str:
        return "true or false"

    def placeholder(self, unit: str) -> str:
        return "true|false"


class Text(Kind):
    def parse(self, given: Any) -> str:
        if not isinstance(given, str):
            raise TypeError
        return given

    def words(self, range: Range) -> str:
        return "a text"

    def plural(self, range: Range) -> str:
        return "names"

    def placeholder(self, unit: str) -> str:
        return unit or "TEXT"


@dataclass(frozen=True)
class Choice(Kind):
    """One of some texts."""

    values: tuple[str, ...]

    def parse(self, given: Any) -> str:
        return self.values[self.values.index(given)]

    def words(self, range: Range) -> str:
        return _either([repr(value) for value in self.values])

    def placeholder(self, unit: str) -> str:
        return "|".join(self.values)


@dataclass(frozen=True)
class ChoiceOrPath(Kind):
    """One of some texts, or the import path of an object of the user's own. ``values`` is empty for
    a path alone.
    """

    values: tuple[str, ...]

    def parse(self, given: Any) -> str:
        if not isinstance(given, str):
            raise TypeError
        if given not in self.values and not is_import_path(given):
            raise ValueError
        return given

    def words(self, range: Range) -> str:
        return _either([repr(value) for value in (*self.values, FORM)])

    def placeholder(self, unit: str) -> str:
        return "|".join((*self.values, FORM))


@dataclass(frozen=True)
class Sequence(Kind):
    """Several values of one type; on a command line with commas, around which a value of its own
    commas is quoted, the pairs of a list with colons. count: None for any number.
    """

    item: Kind
    count: int | None
    separator: str = ","

    def parse(self, given: Any) -> tuple[Any, ...]:
        if isinstance(given, str):
            parts = parted(given) if self.separator == "," else given.split(self.separator)
            given = [part.strip() for part in parts] if given else []
        if not isinstance(given, list | tuple) or self.count not in (None, len(given)):
            raise TypeError
        return tuple(self.item.parse(each) for each in given)

    def words(self, range: Range) -> str:
        return f"{'a list of' if self.count is None else self.count} {self.item.plural(range)}"

    def plural(self, range: Range) -> str:
        return f"pairs of {self.item.plural(range)}, such as 0{self.separator}1"

    def placeholder(self, unit: str) -> str:
        one = self.item.placeholder(unit)
        if self.separator != ",":  # a list's unit is that of its pairs
            return one
        return f"{one},..." if self.count is None else ",".join([one] * self.count)

    def within(self, value: Any, range: Range) -> bool:
        return all(self.item.within(each, range) for each in value)


def parted(text: str) -> list[str]:
    """Returns the values of a list on a command line, as in CSV: between commas, and between double
    quotes where a value has commas of its own; a quote in one that is quoted is doubled:

        "bonnet, poke bonnet",tench

    Raises ``ValueError`` for a quote that does not end, or ends in the middle of a value.
    """
    found, at, more = [], 0, True
    while more:
        item = ITEM.match(text, at)
        if item is None:
            raise ValueError
        found.append(item["plain"] if item["quoted"] is None else item["quoted"].replace('""', '"'))
        at, more = item.end(), item["more"] == ","
    return found


def joined(values: typing.Iterable[str]) -> str:
    """Returns values as ``parted`` reads them."""
    return ",".join(
        '"' + value.replace('"', '""') + '"' if "," in value or value.startswith('"') else value
        for value in values
    )


class Table(Kind):
    """Keyword arguments; on a command line a table of TOML in one line: "depths = [1, 1]"."""

    def parse(self, given: Any) -> dict[str, Any]:
        if isinstance(given, str):
            given = _inline(given)
        if not isinstance(given, dict) or not _plain(given, LEVELS - 1):
            raise TypeError
        return given

    def words(self, range: Range) -> str:
        return "a table of keyword arguments, such as 'name = 8, other = [1, 2]'"

    def placeholder(self, unit: str) -> str:
        return "TABLE"


def _inline(text: str) -> object:
    """Returns the table of a line of TOML, its braces given or left out. Raises ``ValueError``."""
    text = text.strip()
    braced = text.startswith("{") and text.endswith("}")
    try:
        found = tomllib.loads(f"table = {text if braced else '{' + text + '}'}")
    except RecursionError:
        raise ValueError from None
    if found.keys() != {"table"}:  # the text went on behind its line
        raise ValueError
    return found["table"]


def inline(value: Any) -> str:
    """Returns a value as TOML writes it in one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key(name)} = {inline(each)}' for name, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    # JSON leaves the one control character alone that TOML does not
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def key(name: str) -> str:
    """Returns the name of a table's entry as TOML writes it."""
    return name if BARE.fullmatch(name) else inline(name)


def _plain(value: object, levels: int) -> bool:
    """Returns True if a run's folder can keep a value: texts, truths, finite numbers and None, and
    lists and tables of them within each other on no more than so many levels.
    """
    if isinstance(value, dict):
        named = all(isinstance(name, str) for name in value)
        return levels > 0 and named and all(_plain(each, levels - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return levels > 0 and all(_plain(each, levels - 1) for each in value)
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) < BELOW
    return value is None or isinstance(value, str)


@dataclass(frozen=True)
class Optional(Kind):
    """A value, or None, which neither TOML nor a command line can say: the field is left out."""

    value: Kind

    def parse(self, given: Any) -> Any:
        return None if given is None else self.value.parse(given)

    def words(self, range: Range) -> str:
        return f"{self.value.words(range)}, or leave it out"

    def placeholder(self, unit: str) -> str:
        return self.value.placeholder(unit)

    def within(self, value: Any, range: Range) -> bool:
        return value is None or self.value.within(value, range)


class TruthOrAuto(Truth):
    """True, false or "auto"."""

    def parse(self, given: Any) -> Any:
        return given if given == "auto" else super().parse(given)

    def words(self, range: Range) -> str:
        return "true, false or 'auto'"

    def placeholder(self, unit: str) -> str:
        return "true|false|auto"


SIMPLE: dict[Any, Kind] = {
    int: Number(int),
    float: Number(float),
    bool: Truth(),
    bool | Literal["auto"]: TruthOrAuto(),
    str: Text(),
    dict[str, Any]: Table(),
}


def kind_of(annotation: Any) -> Kind:
    """Returns the kind of a field's type. Raises ``TypeError`` for a type that no field has had so
    far.
    """
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return Choice(arguments)
    if origin is tuple:
        item = kind_of(arguments[0])
        if isinstance(item, Sequence):
            item = dataclasses.replace(item, separator=":")
        return Sequence(item, None if arguments[-1] is ... else len(arguments))
    if annotation is ImportPath:
        return ChoiceOrPath(())
    if origin in (types.UnionType, typing.Union) and arguments[1:] == (ImportPath,):
        return ChoiceOrPath(typing.get_args(arguments[0]))
    if origin in (types.UnionType, typing.Union) and arguments[1:] == (type(None),):
        return Optional(kind_of(arguments[0]))
    raise TypeError(f"no kind of option has the type {annotation}")


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
