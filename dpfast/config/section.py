"""The parts that all sections of a recipe share: their checks and the names of their fields."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any, ClassVar

from dpfast.config.option import Option, options, shown
from dpfast.errors import RecipeError

# section -> its class, as each declares itself; "" is the recipe
_OWNERS: dict[str, Any] = {}


class Section:
    """The fields of one section, or of the recipe itself: each as its type, and all in harmony.

    Raises ``RecipeError`` for a value that is not of its field's type and range.
    """

    section: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.section = name
        _OWNERS[name] = cls

    def __post_init__(self) -> None:
        owner: Any = type(self)
        for name, each in options(owner).items():
            named = short_name(f"{self.section}.{name}".lstrip("."))
            value = each.value(named, getattr(self, name))
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Raises ``RecipeError`` for values that are right alone and wrong together."""


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise RecipeError(f"{printable(name)} = {shown(value)}: expected {wanted}")


def require_schedule(name: str, points: tuple[tuple[float, float], ...]) -> None:
    """Raises ``RecipeError`` unless the fractions of a schedule rise, from 0 to 1 at most."""
    at = [fraction for fraction, _ in points]
    rising = all(first < second for first, second in pairwise(at))
    wanted = "fractions of the steps that rise, from 0 to 1 at most"
    require(rising and max(at, default=0) <= 1, name, points, wanted)


def printable(name: str) -> str:
    """Returns a field's name as it was said, on one line whatever is in it."""
    return name if name.isprintable() and name else repr(name)


@functools.cache
def fields() -> dict[str, Option]:
    """Maps each full name to its option: of the recipe itself (``seed``) and of its sections
    (``guidance.omega``).
    """
    return {
        f"{section}.{name}".lstrip("."): each
        for section in sorted(_OWNERS)
        for name, each in options(_OWNERS[section]).items()
    }


@functools.cache
def _full_names() -> dict[str, list[str]]:
    """Maps the last word of a full name to the full names that end in it."""
    found: dict[str, list[str]] = {}
    for name in fields():
        found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def full_name(name: str) -> str:
    """Returns the full name of a field that is named by its full name or by its last word.

    Raises ``RecipeError`` for an unknown name, and for a last word that several sections have.
    """
    if name in fields():
        return name
    found = _full_names().get(name, [])
    if len(found) > 1:
        raise RecipeError(f"{name}: several sections have it; say {' or '.join(found)}")
    if not found:
        raise RecipeError(
            f"{printable(name)}: no such field of a recipe; "
            f"known are {', '.join(map(short_name, fields()))}"
        )
    return found[0]


def short_name(name: str) -> str:
    """Returns the last word of a field's full name where no other section has it, else the full
    name.
    """
    last = name.rpartition(".")[2]
    return last if _full_names().get(last, [name]) == [name] else name
