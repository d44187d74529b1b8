"""Fields that explain themselves: what a field means, its unit and which values it takes.

A dataclass says so once, where the field is::

    every: int = option(3, unit="steps", low=1, help="one step in so many is guided")

From it come the check of a value, the text of the error, the option of a command line and the row
of the reference page.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dpfast.errors import RecipeError

T = TypeVar("T")
TEXTS = {"true": True, "false": False, "1": True, "0": False}  # of a bool on a command line


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field's meaning and its values.

    help: a phrase without a full stop. unit: of a number, or what a text names ("folder"). low and
    high belong to the range, above and below do not; of a list they hold for each item. unset: what
    the default means where it is None or empty. kind: the field's type.
    """

    help: str
    unit: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    unset: str = ""
    kind: Any = None
    default: Any = None

    def value(self, name: str, given: object) -> Any:
        """``given`` as the field's type; the text of a command line is taken as well.

        Raises ``RecipeError``, which calls the field ``name``.
        """
        try:
            value = self._parsed(self.kind, given)
        except ValueError:
            raise RecipeError(f"{name} = {given!r}: expected {self.expected}") from None
        items = value if isinstance(value, tuple) else (value,)
        if not all(self._inside(item) for item in items if isinstance(item, int | float)):
            raise RecipeError(f"{name} = {value!r}: expected {self.expected}")
        return value

    @property
    def expected(self) -> str:
        """The values it takes, in words."""
        return self._expected(self.kind)

    @property
    def range(self) -> str:
        """The range of its numbers in words; empty where every number is in it."""
        if self.low is not None and self.high is not None:
            return f"between {self.low:.16g} and {self.high:.16g}"
        words = {"at least": self.low, "above": self.above, "at most": self.high}
        words["below"] = self.below
        return " and ".join(f"{word} {x:.16g}" for word, x in words.items() if x is not None)

    @property
    def placeholder(self) -> str:
        """What stands for its value in a help text."""
        return self._placeholder(self.kind)

    @property
    def default_text(self) -> str:
        """The default as a command line writes it, or what it means."""
        if self.unset:
            return self.unset
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return ",".join(
                f"{item:g}" if isinstance(item, float) else item for item in self.default
            )
        return f"{self.default:.16g}" if isinstance(self.default, float) else str(self.default)

    def _parsed(self, kind: Any, given: Any) -> Any:
        """``given`` as ``kind``. Raises ``ValueError`` where it is not."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            for each in arguments:
                try:
                    return self._parsed(each, given)
                except ValueError:
                    continue
            raise ValueError
        if origin is Literal:
            return (
                next(each for each in arguments if each == given) if given in arguments else _no()
            )
        if origin is tuple:
            items = [text.strip() for text in given.split(",")] if isinstance(given, str) else given
            items = [] if given == "" else items
            if not isinstance(items, list | tuple):
                raise ValueError
            if arguments[-1] is ... or len(items) == len(arguments):
                return tuple(self._parsed(arguments[0], item) for item in items)
            raise ValueError
        if kind is type(None) or kind is str or origin is dict:
            return given if isinstance(given, origin or kind) else _no()
        if kind is bool:
            given = TEXTS.get(given.lower()) if isinstance(given, str) else given
            return given if isinstance(given, bool) else _no()
        return self._number(kind, given)

    def _number(self, kind: Any, given: Any) -> float:
        try:
            number = float(given) if not isinstance(given, bool) else math.nan
        except TypeError:
            raise ValueError from None
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
        return int(number) if kind is int else number

    def _inside(self, number: float) -> bool:
        return (
            (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )

    def _expected(self, kind: Any, *, several: bool = False) -> str:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            known = [each for each in arguments if each is not type(None)]
            words = _either([word for each in known for word in self._words(each)])
            return words if len(known) == len(arguments) else f"{words}, or leave it out"
        if origin is tuple and arguments[-1] is not ...:
            return f"{len(arguments)} {self._expected(arguments[0], several=True)}"
        if origin is tuple and typing.get_origin(arguments[0]) is Literal:
            return f"a list of {self._expected(arguments[0])}"
        if origin is tuple:
            return f"a list of {self._expected(arguments[0], several=True)}"
        if several and kind is str:
            return "names"
        words = _either(self._words(kind))
        return words.removeprefix("a ").replace("number", "numbers", 1) if several else words

    def _words(self, kind: Any) -> list[str]:
        if kind is bool:
            return ["true", "false"]
        if typing.get_origin(kind) is Literal:
            return [repr(each) for each in typing.get_args(kind)]
        if kind in (int, float):
            noun = (
                "a whole number" if kind is int else "a number" if self.range else "a finite number"
            )
            of = " of" if self.range.startswith("at") else ""
            return [f"{noun}{of} {self.range}".rstrip()]
        return ["a text" if kind is str else "a table of keyword arguments"]

    def _placeholder(self, kind: Any) -> str:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            return "|".join(self._placeholder(each) for each in arguments if each is not type(None))
        if origin is tuple:
            one = self._placeholder(arguments[0])
            return f"{one},..." if arguments[-1] is ... else ",".join([one] * len(arguments))
        if origin is Literal:
            return "|".join(arguments)
        if kind is bool:
            return "true|false"
        return self.unit.upper() or {int: "N", float: "X", str: "TEXT"}.get(kind, "TABLE")


def option(
    default: T,
    *,
    help: str,
    unit: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    unset: str = "",
) -> T:
    """A dataclass's field with an ``Option`` in its metadata."""
    made = Option(help=help, unit=unit, low=low, above=above, high=high, below=below, unset=unset)
    return dataclasses.field(default=default, metadata={"option": made})


@functools.cache
def options(owner: type) -> dict[str, Option]:
    """Name -> option of a dataclass's fields that have one, in their order."""
    kinds = typing.get_type_hints(owner)
    found = {}
    for field in dataclasses.fields(owner):
        if "option" in field.metadata:
            default = None if field.default is dataclasses.MISSING else field.default
            made = field.metadata["option"]
            found[field.name] = dataclasses.replace(made, kind=kinds[field.name], default=default)
    return found


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _no() -> typing.NoReturn:
    raise ValueError
