"""``dpfast rehearse``: a recipe at its true size on GPUs that are not there."""

from __future__ import annotations

import argparse

from dpfast.cli import Next
from dpfast.cli.parser import Commands
from dpfast.cli.recipes import (
    add_recipe_command,
    folder_words,
    launched,
    recipe_of,
    recipe_words,
)
from dpfast.terminal import say


def add(commands: Commands) -> None:
    about = "walk a recipe at its true size through GPUs that are not there"
    example = "dpfast rehearse imagenet1k-sd15 --device h100 --count 8"
    parser = add_recipe_command(
        commands,
        "rehearse",
        rehearse,
        about,
        example=example,
        page="guides/many_gpus.md",
        without=("device",),
    )
    parser.add_argument(
        "--device",
        default="h100",
        metavar="GPU",
        help="the GPU that the rehearsal is about, not one to run on: a100, h100, h200, b200, "
        "rtx4090 (default: h100)",
    )
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="how many of them (default: 1)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="the run's --timeout (default: 600)",
    )
    parser.add_argument(
        "--disk",
        type=float,
        metavar="GIB",
        help="free disk where --out of the run will be (default: not asked)",
    )


def rehearse(arguments: argparse.Namespace) -> int | Next:
    """Prints what was found. Exit code 1 where something would go wrong."""
    recipe = recipe_of(arguments)
    recipe.check_ranks(arguments.count)

    from dpfast.rehearsal import rehearse
    from dpfast.rehearsal.table import rehearsal_table

    disk = None if arguments.disk is None else arguments.disk * 2**30
    found = rehearse(
        recipe, arguments.device, count=arguments.count, timeout=arguments.timeout, disk=disk
    )
    say(rehearsal_table(found))
    if found.failures:
        return 1
    words = [*recipe_words(arguments), *folder_words(recipe)]
    return Next(("the run, on these devices", [*launched(arguments.count), "run", *words]))
