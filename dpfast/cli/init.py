"""``dpfast init``: a recipe of one's own to start from, with a word on each field."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpfast.cli import Next
from dpfast.cli.parser import Commands, add_command
from dpfast.cli.recipes import folder_words
from dpfast.config import RECIPES, SECTIONS, Option, Recipe, fields
from dpfast.config.kinds import inline, key
from dpfast.errors import InputError

WIDTH = 80  # columns of the file


def add(commands: Commands) -> None:
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    parser = add_command(
        commands,
        "init",
        init,
        "write a recipe of your own, with a word on each field",
        example="dpfast init my.toml --from fashion",
        page="guides/own_data.md",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the new file, my.toml")
    parser.add_argument(
        "--from",
        dest="source",
        default="fashion",
        metavar="RECIPE",
        help=f"whose values it has: a path that ends in .toml, or one of {known} (default: "
        "fashion)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is there")


def init(arguments: argparse.Namespace) -> Next:
    file: Path = arguments.file
    if file.suffix != ".toml":
        raise InputError(f"file = {str(file)!r}: expected a name that ends in .toml")
    recipe = Recipe.load(arguments.source)
    if file.is_dir():
        raise InputError(f"file = {str(file)!r}: is a folder; expected a file")
    if not file.parent.is_dir():
        raise InputError(f"file = {str(file)!r}: no folder {str(file.parent)!r}; make it first")
    text = recipe_text(recipe, file)
    try:
        with file.open("w" if arguments.overwrite else "x", encoding="utf-8") as opened:
            opened.write(text)
    except FileExistsError:
        raise InputError(f"file = {str(file)!r}: exists; --overwrite replaces it") from None
    print(f"{file}, a recipe with the values of {recipe.name}")
    words = ["dpfast", "run", str(file), *folder_words(recipe), "--dry-run"]
    return Next(("whether it runs, and what it takes on this machine", words))


def recipe_text(recipe: Recipe, file: Path) -> str:
    """Returns a recipe as TOML: each section with its most used fields and all that have another
    value than their default, each below what its ``Option`` says of it. The name is left to the
    file's.
    """
    name = file.name if file.name.isprintable() else "FILE"
    lines = [
        f"# A recipe of dpfast, with the values of {inline(recipe.name)}.",
        "#",
        f"#     dpfast run {shlex.quote(name)} --dry-run",
        f"#     dpfast run {shlex.quote(name)}",
        "#",
        "# What stands here are the most used fields. All others, with what they mean and",
        f"# their defaults: dpfast run {shlex.quote(name)} --help",
    ]
    values = recipe.to_dict()
    for section in ("", *SECTIONS):
        tables = []
        lines += _heading(section)
        for full, option in fields().items():
            of_section, _, short = full.rpartition(".")
            value = (values[section] if section else values).get(short)
            if full == "name" or of_section != section:
                continue
            if not option.common and value == option.default:
                continue
            told = ["", *_comment(option.help), *_comment(_facts(option))]
            if isinstance(value, dict) and value:  # a table of its own ends those around it
                tables += [*told, f"[{section}.{short}]", *_entries(value)]
            else:
                lines += [*told, _said(short, option, value)]
        lines += tables
    return "\n".join(lines) + "\n"


def _heading(section: str) -> Iterator[str]:
    if section:
        yield ""
        yield ""
        yield f"[{section}]"
        yield from _comment(" ".join((SECTIONS[section].__doc__ or "").split()))


def _facts(option: Option) -> str:
    """Returns a field's values, their unit and its default."""
    values = option.expected.removesuffix(", or leave it out")
    unit = f" ({option.unit})" if option.unit else ""
    return f"{values}{unit}; default: {option.default_text}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False)]


def _said(name: str, option: Option, value: Any) -> str:
    """Returns a field with its value; one that TOML cannot say is left to its default."""
    if value is None or value == {}:
        return f"# {name} = {option.placeholder}"
    return "\n".join(_entries({name: value}))


def _entries(table: dict[str, Any]) -> Iterator[str]:
    """Yields a table's entries; a list that is longer than a line has one item a line."""
    for name, value in table.items():
        line = f"{key(name)} = {inline(value)}"
        if len(line) > WIDTH and isinstance(value, (list, tuple)):
            line = "\n".join([f"{key(name)} = [", *(f"    {inline(v)}," for v in value), "]"])
        yield line
