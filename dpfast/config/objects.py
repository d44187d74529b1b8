"""The objects that a run was given in place of what its recipe says: ``objects.json``, beside it.

A recipe holds names and numbers. Where a caller hands in a pipeline, a learner or real images, the
run's folder names the kind of each, and whoever goes on needs the same kinds again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpfast.errors import InputError
from dpfast.textfiles import read_json

OBJECTS_FILE = "objects.json"


def kind_of(thing: object) -> str:
    """Returns the name of an object in ``objects.json``: the module and name of its class, or of a
    function.
    """
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def objects_of(run: Path) -> dict[str, str]:
    """Maps each argument of ``DeliberatePractice`` that a run was given to its kind; {} without
    objects.

    Raises ``InputError`` for a file that is damaged.
    """
    path = run / OBJECTS_FILE
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict) or not all(isinstance(kind, str) for kind in found.values()):
        raise InputError(f"{path}: is no table of arguments and kinds of objects")
    return found


def check_objects(run: Path, given: Mapping[str, str]) -> None:
    """Raises ``InputError`` where a run goes on with objects of other kinds than it began with."""
    began = objects_of(run)
    for name in sorted(began.keys() | given.keys()):
        before, now = began.get(name), given.get(name)
        if before != now:
            was, gets = (f"an object, {kind}" if kind else "the recipe's" for kind in (before, now))
            raise InputError(
                f"resume: the run in {str(run)!r} began with {name} = {was}, and gets {gets}; give "
                f"DeliberatePractice(..., {name}=...) as it was"
            )
