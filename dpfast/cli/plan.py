"""``dpfast plan``: what a recipe takes on a number of devices, before any of them is rented."""

from __future__ import annotations

import argparse

from dpfast.cli import Next
from dpfast.cli.parser import Commands
from dpfast.cli.recipes import add_recipe_command, folder_words, recipe_of, recipe_words
from dpfast.terminal import say, width


def add(commands: Commands) -> None:
    about = "hours, samples/s, memory and limits of a recipe on given devices"
    # the plan's device may be another than that of the run
    example = "dpfast plan imagenet1k-sd15 --device h100 --count 8"
    parser = add_recipe_command(
        commands,
        "plan",
        plan,
        about,
        example=example,
        page="guides/many_gpus.md",
        without=("device",),
    )
    parser.add_argument(
        "--device",
        default="h100",
        metavar="GPU",
        help="the GPU that the plan is about, not one to run on: a100, h100, h200, b200, rtx4090, "
        "or here: this machine, measured (default: h100)",
    )
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="how many of them (default: 1)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="FRACTION",
        help="share of every limit that is reached (default: of generation as measured on an H200, "
        "0.4 of training)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="samples at the end of the run (default: as many as the recipe allows)",
    )


def plan(arguments: argparse.Namespace) -> Next:
    recipe = recipe_of(arguments)
    recipe.check_ranks(arguments.count)

    from dpfast.hardware.peaks import HERE
    from dpfast.planning.measure import measure
    from dpfast.planning.plan import plan
    from dpfast.planning.table import plan_table

    made = plan(
        recipe,
        arguments.device,
        count=arguments.count,
        utilisation=arguments.utilisation,
        samples=arguments.samples,
        timings=measure(recipe) if arguments.device.lower() == HERE else None,
    )
    say(plan_table(made, width()))
    words = recipe_words(arguments)
    if arguments.device.lower() == HERE:
        return Next(("the run", ["dpfast", "run", *words, *folder_words(recipe)]))
    words += ["--device", arguments.device, "--count", str(arguments.count)]
    return Next(("the run's memory, waits and checkpoints", ["dpfast", "rehearse", *words]))
