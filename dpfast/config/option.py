"""Fields that explain themselves: what a field means, its unit and which values it takes.

A dataclass says so once, where the field is::

    every: int = option(3, unit="steps", low=1, help="one step in so many is guided")

From it come the check of a value, the text of the error, the option of a command line and the row
of the reference page.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_type_hints

from dpfast.config.kinds import Kind, Range, inline, joined, kind_of
from dpfast.errors import LARGEST, RecipeError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field's meaning and its values.

    help: a phrase without a full stop. unit: of a number, or what a text names ("folder"); empty
    for none. range: of its numbers, those of a list one by one. unset: what the default means where
    it is None or empty. common: whether it is one of the most used, which a help text shows first.
    """

    help: str
    unit: str
    range: Range
    unset: str
    common: bool
    kind: Kind
    default: Any

    def value(self, name: str, given: object) -> Any:
        """Returns ``given`` as the field's type; the text of a command line is taken as well.

        Raises ``RecipeError``, which calls the field ``name``.
        """
        try:
            value = self.kind.parse(given)
        except OverflowError:
            wanted = f"{self.expected}, with numbers up to {LARGEST:.1e} either way"
            raise RecipeError(f"{name} = {shown(given)}: expected {wanted}") from None
        except (TypeError, ValueError):
            raise RecipeError(f"{name} = {shown(given)}: expected {self.expected}") from None
        if not self.kind.within(value, self.range):
            raise RecipeError(f"{name} = {shown(value)}: expected {self.expected}")
        return value

    @property
    def expected(self) -> str:
        """The values it takes, in words."""
        return self.kind.words(self.range)

    @property
    def placeholder(self) -> str:
        """The text that stands for its value in a help text."""
        return self.kind.placeholder(self.unit.upper())

    @property
    def default_text(self) -> str:
        """The meaning of the default, or the default as a command line writes it."""
        return self.unset or self.text(self.default)

    def text(self, value: Any) -> str:
        """Returns a value as a command line writes it."""
        if isinstance(value, tuple):
            pairs = bool(value) and isinstance(value[0], tuple)
            return joined(":".join(map(self.text, v)) if pairs else self.text(v) for v in value)
        if isinstance(value, dict):
            return inline(value)[1:-1]
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:.16g}" if isinstance(value, float) else str(value)


def shown(value: object) -> str:
    """Returns a value as Python writes it; its type where that is too long for Python itself: a
    whole number of more than 4,300 digits, or tables nested without end.
    """
    try:
        return repr(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__}, too long to be shown>"


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
    common: bool = False,
) -> T:
    """Returns a field of a dataclass that has an ``Option``. low and high belong to the range,
    above and below do not; a dict as default is copied.
    """
    bounds = Range(low=low, above=above, high=high, below=below)
    declared = {"help": help, "unit": unit, "range": bounds, "unset": unset, "common": common}
    metadata = {"option": declared}
    if isinstance(default, dict):
        return cast(T, dataclasses.field(default_factory=default.copy, metadata=metadata))
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def options(owner: type) -> dict[str, Option]:
    """Maps the names of a dataclass's fields that have an option to it, in their order."""
    types, found = get_type_hints(owner), {}
    for field in dataclasses.fields(owner):
        declared = field.metadata.get("option")
        if declared is not None:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            kind = kind_of(types[field.name])
            found[field.name] = Option(**declared, kind=kind, default=default)
    return found
