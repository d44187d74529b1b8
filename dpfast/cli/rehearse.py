"""``dpfast rehearse``: a recipe at its true size on GPUs that are not there."""

from __future__ import annotations

import argparse

from dpfast.cli import Commands
from dpfast.cli.recipes import add_recipe, recipe_of


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "rehearse",
        help="walk a recipe at its true size through GPUs that are not there",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device",
        default="h100",
        help="the GPU that the rehearsal is about, not one to run on: a100, h100, h200, b200, "
        "rtx4090 (default h100)",
    )
    parser.add_argument("--count", type=int, default=1, help="how many of them (default 1)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="of the run; default 600"
    )
    parser.add_argument(
        "--disk", type=float, metavar="GIB", help="free where --out will be; default: not asked"
    )
    add_recipe(parser, without=("device",))
    parser.set_defaults(handler=rehearse)


def rehearse(arguments: argparse.Namespace) -> int:
    """Prints what was found. Exit code 1 where something would go wrong."""
    recipe = recipe_of(arguments)
    recipe.check_ranks(arguments.count)

    from dpfast.rehearsal import rehearse
    from dpfast.rehearsal.table import rehearsal_table

    disk = None if arguments.disk is None else arguments.disk * 2**30
    found = rehearse(
        recipe, arguments.device, count=arguments.count, timeout=arguments.timeout, disk=disk
    )
    print(rehearsal_table(found))
    return 1 if found.failures else 0
