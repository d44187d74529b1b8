"""Objects of the user's own that a recipe names by where Python finds them: package.module:name."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, TypeVar

from dpfast.errors import InputError, first_line

FORM = "package.module:name"
T = TypeVar("T")


def is_import_path(text: str) -> bool:
    """Returns True if a text has the form of an import path, ``FORM``: a module and what it calls
    an object, "nets:tiny" or "my.sources:Hard.near".
    """
    module, colon, name = text.partition(":")
    return bool(colon) and all(
        part.isidentifier() for part in (*module.split("."), *name.split("."))
    )


def imported_module(field: str, path: str) -> ModuleType:
    """Returns the module of an import path. Raises ``InputError`` as ``imported`` does."""
    module = path.partition(":")[0]
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a module of others raises
        raise InputError(
            f"{field} = {path!r}: cannot import {module} ({first_line(error)})"
        ) from error


def imported(field: str, path: str) -> Any:
    """Returns the object that a field of a recipe names by an import path.

    The module is imported as Python does it, from its working directory too where ``dpfast`` is a
    command, once in each process: on every rank, and anew by a run that goes on.

    Raises ``InputError``, which names the field and the path, where the module cannot be imported
    and where nothing has the name.
    """
    found: Any = imported_module(field, path)
    for part in path.partition(":")[2].split("."):
        try:
            found = getattr(found, part)
        except Exception as error:  # whatever a module's own __getattr__ raises
            raise InputError(f"{field} = {path!r}: {first_line(error)}") from error
    return found


def made(field: str, path: str, kind: type[T], *given: Any, **arguments: Any) -> T:
    """Calls the class or the function at an import path with arguments, and returns the result.

    Raises ``InputError`` as ``imported`` does, and where it gives none of ``kind``, a class of
    dpfast's public names or of another package.
    """
    found = imported(field, path)
    own = kind.__module__.startswith("dpfast.")
    home = "dpfast" if own else kind.__module__
    wanted = f"a kind of {home}.{kind.__name__}, or a function that gives one"
    if not callable(found):
        raise InputError(f"{field} = {path!r}: is a {type(found).__name__}, expected {wanted}")
    try:
        thing = found(*given, **arguments)
    except Exception as error:  # whatever a class of others raises
        raise InputError(f"{field} = {path!r}: {first_line(error)}") from error
    if not isinstance(thing, kind):
        raise InputError(f"{field} = {path!r}: gives a {type(thing).__name__}, expected {wanted}")
    return thing
