"""What a generated input is, and how it has to end: in the right result, or in one line that names
what is wrong.
"""

from __future__ import annotations

import functools
import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpfast.errors import InputError
from dpfast.feed.loader import LoaderError

PACKAGE = Path(__file__).parents[2] / "dpfast"
ERRORS = PACKAGE.parent / "docs" / "reference" / "errors.md"
# What a user does not see: Python keeps four kinds back, dpfast.data.pictures the last.
UNSEEN = (
    *(DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning),
    Image.DecompressionBombWarning,
)
NEVER = object()  # of an input that nothing right can come of


@dataclass(frozen=True)
class Case:
    """One input.

    run: gives it to dpfast. named: what a refusal must say, one of them (a file, a folder or an
    argument). right: what ``run`` has to return, by the generator's own account; NEVER: it has to
    be refused. valid: an input that must not be refused; others may be, odd as they are.
    near: how far numbers may lie from the right ones (JPEG).
    """

    run: Callable[[], Any]
    named: tuple[str, ...]
    right: Any = NEVER
    valid: bool = False
    near: float = 0.0


Generator = Callable[[random.Random, Path], Case]
GENERATORS: dict[str, tuple[Generator, int]] = {}  # "kind/name" -> generator, number of seeds


def generated(seeds: int = 1) -> Callable[[Generator], Generator]:
    """Registers a generator, whose cases are those of so many seeds."""

    def register(make: Generator) -> Generator:
        kind = make.__module__.rpartition(".")[2]
        name = f"{kind}/{make.__name__.strip('_')}"
        assert name not in GENERATORS, name
        GENERATORS[name] = (make, seeds)
        return make

    return register


def listed(kind: str, cases: dict[str, Any], make: Callable[..., Case]) -> None:
    """Registers ``make(value, random, folder)`` for each named value."""
    for name, value in cases.items():

        def one(random: random.Random, folder: Path, value: Any = value) -> Case:
            return make(value, random, folder)

        key = f"{kind}/{make.__name__.strip('_')}-{name}"
        assert key not in GENERATORS, key
        GENERATORS[key] = (one, 1)


def names() -> Iterator[str]:
    """The names of all cases: "kind/generator/seed"."""
    for name, (_, seeds) in GENERATORS.items():
        yield from (f"{name}/{seed}" for seed in range(seeds))


def case_of(name: str, folder: Path) -> Case:
    """The case of a name, its files written into ``folder``; the name is its seed."""
    generator, _, _ = name.rpartition("/")
    return GENERATORS[generator][0](random.Random(name), folder)


def check(case: Case) -> None:
    """Raises ``AssertionError`` unless the case ends as it has to."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for kind in UNSEEN:
            warnings.simplefilter("ignore", kind)
        try:
            result, said = case.run(), None
        except (InputError, LoaderError) as error:
            said = f"{error}"
    foreign = [f"{w.category.__name__}: {w.message}" for w in seen if not _ours(w)]
    assert not foreign, f"a foreign warning: {foreign[0]}"
    if said is None:
        assert case.right is not NEVER, f"taken as {shown(result)}, must be refused"
        wrong = difference(result, case.right, case.near)
        assert wrong is None, f"{wrong}: {shown(result)}, right: {shown(case.right)}"
        return
    assert not case.valid, f"a valid input is refused: {said}"
    assert len(said.splitlines()) == 1, f"a message of none or several lines: {said!r}"
    assert said.isprintable(), f"a message that a terminal obeys: {said!r}"
    assert any(name in said for name in case.named), f"names none of {case.named}: {said!r}"
    assert any(row.search(said) for row in explained()), f"no row of errors.md: {said!r}"


@functools.cache
def explained() -> list[re.Pattern[str]]:
    """A pattern for each message on the page of errors: its fixed words in their order."""
    rows = re.findall(r"^\| (.*?) \| ", ERRORS.read_text(encoding="utf-8"), re.MULTILINE)
    forms = [form for row in rows for form in re.findall(r"`([^`]+)`", row)]
    fixed = [re.split(r"\.\.\.|\b[A-Z][A-Z_]+\b", form.replace("\\|", "|")) for form in forms]
    long = [parts for parts in fixed if len("".join(parts)) >= 8]
    return [re.compile(".*".join(map(re.escape, parts))) for parts in long]


def _ours(warning: warnings.WarningMessage) -> bool:
    return warning.category.__module__.startswith("dpfast.") or Path(
        warning.filename
    ).is_relative_to(PACKAGE)


def difference(found: Any, right: Any, near: float) -> str | None:
    """In words how ``found`` differs from ``right``; None where it does not."""
    if isinstance(found, torch.Tensor):
        found = found.numpy()
    if isinstance(right, np.ndarray):
        if not isinstance(found, np.ndarray) or found.shape != right.shape:
            return f"shape {getattr(found, 'shape', None)}, right: {right.shape}"
        far = np.abs(found.astype(float) - right.astype(float)).max(initial=0)
        return None if far <= near else f"numbers are {far} apart"
    if isinstance(right, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(right):
            return "another length"
        parts = (difference(f, r, near) for f, r in zip(found, right, strict=True))
        return next((part for part in parts if part is not None), None)
    return None if found == right else "another value"


def shown(value: Any) -> str:
    """A value in a few words."""
    text = repr(value)
    return " ".join(text[:300].split())


logging.getLogger("dpfast").addHandler(logging.NullHandler())
