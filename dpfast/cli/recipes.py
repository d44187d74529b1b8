"""A recipe and its fields on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from dpfast.config import Recipe, fields


def add_recipe(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """The recipe, and an option for each of its fields but those of ``without``."""
    parser.add_argument("recipe", help="a recipe's name (fashion) or a path that ends in .toml")
    group = parser.add_argument_group("fields of the recipe", "each replaces the recipe's value")
    for name, field in fields().items():
        if name not in ("options", "name", *without):
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=f"field.{name}",
                metavar=str(field.type).split("[")[0].upper(),
            )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """Raises ``RecipeError`` for an unknown recipe and for a field that cannot be."""
    given = {
        key.removeprefix("field."): value
        for key, value in vars(arguments).items()
        if key.startswith("field.")
    }
    return Recipe.load(
        arguments.recipe, **{key: value for key, value in given.items() if value is not None}
    )
