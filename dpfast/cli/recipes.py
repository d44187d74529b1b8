"""A recipe and its fields on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from typing import Any

from dpfast.config import Recipe, fields

UNOFFERED = ("name", "learner.options")  # a file's own: its name, and a table


def add_recipe(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Adds the recipe, and an option for each of its fields but those of ``without``."""
    parser.add_argument("recipe", help="a recipe's name (fashion) or a path that ends in .toml")
    add_fields(parser, [name for name in fields() if name not in {*UNOFFERED, *without}])


def add_fields(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds an option for each field: by its full name, ``--guidance.omega``, and by its last word
    alone, ``--omega``, where no other of ``names`` has the same.
    """
    names = list(names)
    last = [name.rpartition(".")[2] for name in names]
    group = parser.add_argument_group("fields of the recipe", "each replaces the recipe's value")
    for name, short in zip(names, last, strict=True):
        spelled = [name] if last.count(short) > 1 or short == name else [name, short]
        group.add_argument(
            *(f"--{each}".replace("_", "-") for each in spelled),
            dest=f"field.{name}",
            metavar=str(fields()[name].type).split("[")[0].upper(),
        )


def recipe_of(arguments: argparse.Namespace, **overrides: Any) -> Recipe:
    """The recipe with the fields that the command line and ``overrides`` replace.

    Raises ``RecipeError`` for an unknown recipe and for a field that cannot be.
    """
    given = {
        key.removeprefix("field."): value
        for key, value in vars(arguments).items()
        if key.startswith("field.") and value is not None
    }
    return Recipe.load(arguments.recipe, **overrides, **given)
