"""A recipe and its fields on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable
from typing import Any

from dpfast.cli import Next
from dpfast.cli.parser import Commands, Parser, add_command
from dpfast.config import RECIPES, SECTIONS, Option, Recipe, fields, flat, short_name

A_NODE = 8  # devices of a machine, where the next command names machines


class FieldHelp(argparse.Action):
    """The ``--help`` of a command with a recipe: beside the defaults it prints the values of the
    recipe that stands before it.
    """

    def __init__(self, *, actions: dict[str, argparse.Action], **options: Any) -> None:
        super().__init__(**options)
        self.actions = actions

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        if isinstance(namespace.recipe, str):
            recipe = Recipe.load(namespace.recipe)
            values = flat(recipe.to_dict())
            for name, action in self.actions.items():
                option, value = fields()[name], values[short_name(name)]
                if value != option.default:
                    action.help = field_help(option, f"in {recipe.name}: {option.text(value)}")
        parser.print_help()
        parser.exit()


def add_recipe_command(
    commands: Commands,
    name: str,
    handler: Callable[[argparse.Namespace], int | Next],
    help: str,
    *,
    example: str,
    page: str,
    without: Collection[str] = (),
) -> Parser:
    """Adds a command on a recipe, with an option for each field but its name, a file's own,
    and those of ``without``.
    """
    usage = f"dpfast {name} RECIPE [--OPTION VALUE ...]"
    parser = add_command(
        commands, name, handler, help, example=example, page=page, usage=usage, add_help=False
    )
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    parser.add_argument(
        "recipe", metavar="RECIPE", help=f"a path that ends in .toml, or one of {known}"
    )
    actions: dict[str, argparse.Action] = {}
    parser.add_argument(
        "-h",
        "--help",
        action=FieldHelp,
        nargs=0,
        actions=actions,
        help="print this; after a RECIPE with the values that it has",
    )
    actions |= add_fields(parser, [name for name in fields() if name not in {"name", *without}])
    return parser


def add_fields(parser: Parser, names: Iterable[str]) -> dict[str, argparse.Action]:
    """Adds an option for each field, in a group for each section: the most used fields of all
    sections, then the others.

    A field is named in full, ``--guidance.omega``, or by its last word alone, ``--omega``, where no
    other of ``names`` has the same. Returns the options by their fields' names.
    """
    names = list(names)
    last = [name.rpartition(".")[2] for name in names]
    groups, actions = {}, {}
    for common in (True, False):
        for name, short in zip(names, last, strict=True):
            option, section = fields()[name], name.rpartition(".")[0]
            if option.common != common:
                continue
            if (section, common) not in groups:
                titles = _heading(section, short) if common else _rest(section)
                groups[section, common] = parser.add_argument_group(*titles)
            spelled = [name] if last.count(short) > 1 or short == name else [name, short]
            actions[name] = groups[section, common].add_argument(
                *(f"--{each}".replace("_", "-") for each in spelled),
                dest=f"field.{name}",
                metavar=option.placeholder,
                help=field_help(option),
            )
    return actions


def field_help(option: Option, *more: str) -> str:
    """Returns the help text of a field's option: its meaning, its default, ``more`` and its
    range.
    """
    facts = [f"default: {option.default_text}", *more, str(option.range)]
    return f"{option.help} ({'; '.join(filter(None, facts))})".replace("%", "%%")


def recipe_of(arguments: argparse.Namespace, **overrides: Any) -> Recipe:
    """Returns the recipe with the fields that the command line and ``overrides`` replace.

    Raises ``RecipeError`` for an unknown recipe and for a field that cannot be.
    """
    given = {
        key.removeprefix("field."): value
        for key, value in vars(arguments).items()
        if key.startswith("field.") and value is not None
    }
    return Recipe.load(arguments.recipe, **overrides, **given)


def guiding_words(arguments: argparse.Namespace, recipe: Recipe) -> list[str]:
    """Returns options of ``dpfast sample`` that guide by the recipe's omega: where it is 0 by that
    of its file, if that is of the same generator; and without its anchor where none can be. The
    anchor of a file's own generator has to be said for another one.
    """
    file, anchor = Recipe.load(arguments.recipe), recipe.guidance.anchor
    other = recipe.generator.pipeline != file.generator.pipeline
    if other:
        file = Recipe()
    omega = recipe.guidance.omega or file.guidance.omega or Recipe().guidance.omega
    words = ["--omega", f"0,{omega:g}"]
    said = getattr(arguments, "field.guidance.anchor", None) is not None
    if anchor and recipe.generator.cfg_scale == 1:
        words += ["--anchor", "0"]
    elif anchor and other and not said:
        words += ["--anchor", f"{anchor:g}"]
    return words


def recipe_words(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Returns the recipe of a command line and its fields as they were said, for another command:
    its first word, and options. names: of the fields that the other one has; without any all of
    them.
    """
    words = [str(arguments.recipe)]
    for key, value in vars(arguments).items():
        name = key.removeprefix("field.")
        if name != key and value is not None and (not names or name in names):
            words += option_words(name, value)
    return words


def option_words(name: str, value: str) -> list[str]:
    """Returns a field's option with its value, which may look like an option itself."""
    option = f"--{short_name(name)}".replace("_", "-")
    return [f"{option}={value}"] if value.startswith("-") else [option, value]


def folder_words(recipe: Recipe) -> list[str]:
    """Returns the options that name the folders which a run of the recipe lacks."""
    lacking = recipe.lacking("pipeline", "validation")
    return [word for name in lacking for word in (f"--{name}", "FOLDER")]


def launched(count: int) -> list[str]:
    """Returns the words before ``run`` on a number of devices, ``A_NODE`` of them in a machine."""
    if count == 1:
        return ["dpfast"]
    words = ["torchrun"]
    if count > A_NODE and count % A_NODE == 0:
        words += ["--nnodes", str(count // A_NODE), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", "HOST:29500"]
        count = A_NODE
    return [*words, "--nproc-per-node", str(count), "-m", "dpfast"]


def _heading(section: str, example: str) -> tuple[str, str]:
    """Returns the title of a section's group, and what it is about."""
    if not section:
        about = "Each replaces the value that the recipe has; the most used ones come first."
        return "the recipe's fields", about
    about = " ".join((SECTIONS[section].__doc__ or "").split())
    example = example.replace("_", "-")
    return f"[{section}]", f"{about} In full: --{section}.{example}, and so on."


def _rest(section: str) -> tuple[str, None]:
    """Returns the title of the group of a section's less used fields."""
    return f"{f'[{section}]' if section else 'the recipe itself'}, the rest", None
