"""Errors that tell a caller what to change, each in one line, and the warning of a full disk."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

LARGEST = 3.4028234663852886e38  # of float32, in which tensors hold what a caller gives


class InputError(ValueError):
    """An error for an argument, a file or a folder that cannot be used.

    The message names it, its value and what would be right. It is one line that a terminal shows
    as it is, whatever names and foreign messages are in it: "\\n" stands for a line feed.

    Examples:
        >>> import dpfast
        >>> dpfast.GuidanceConfig(every=0)
        Traceback (most recent call last):
        dpfast.errors.InputError: every = 0: expected at least 1, which guides every step
    """

    def __str__(self) -> str:
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UnreadableError(InputError):
    """A file or folder that is there and that the file system does not let this user read."""


class RecipeError(InputError):
    """An error for a recipe that cannot run; the message names the field and what would be right.

    Examples:
        >>> import dpfast
        >>> dpfast.Recipe.load("fashion", iterations=0)
        Traceback (most recent call last):
        dpfast.errors.RecipeError: iterations = 0: expected a whole number of at least 10
    """


class SaveWarning(UserWarning):
    """A warning that saving has stopped; the pool goes on in memory."""


def first_line(error: BaseException) -> str:
    """Returns the first line of a foreign message, which may be a page; the error's kind where it
    has no words.
    """
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def unsaved(what: str, then: str = "the run goes on in memory") -> Iterator[None]:
    """Turns what a full disk refuses into a ``SaveWarning``: ``what`` is not written, and what
    ``then`` is the case.
    """
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what}: {error}; {then}", SaveWarning, stacklevel=3)
