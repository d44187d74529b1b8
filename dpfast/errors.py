"""Errors that tell a caller what to change, each in one line."""

from __future__ import annotations


class InputError(ValueError):
    """An argument, a file or a folder that cannot be used.

    The message names it, its value and what would be right.
    """


class RecipeError(InputError):
    """A recipe that cannot run; the message names the field, its value and what would be right."""
