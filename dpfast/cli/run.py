"""``dpfast run``: a recipe and its rivals."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli import Commands
from dpfast.config import Recipe, fields


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "run", help="train a classifier by Deliberate Practice, beside its rivals", allow_abbrev=False
    )
    parser.add_argument("recipe", help="a recipe's name (fashion) or a path that ends in .toml")
    parser.add_argument("--out", type=Path, help="folder of the run; default runs/RECIPE")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    kept.add_argument(
        "--resume", action="store_true", help="continue the run that --out holds from its last evaluation"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the final table")
    group = parser.add_argument_group("fields of the recipe", "each replaces the recipe's value")
    for name, field in fields().items():
        if name not in ("options", "name"):
            group.add_argument(
                f"--{name.replace('_', '-')}", dest=f"field.{name}", metavar=str(field.type).split("[")[0].upper()
            )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    given = {key.removeprefix("field."): value for key, value in vars(arguments).items() if key.startswith("field.")}
    recipe = Recipe.load(arguments.recipe, **{key: value for key, value in given.items() if value is not None})

    from dpfast.practice.loop import DeliberatePractice
    from dpfast.practice.run_folder import RunFolder, check_vacant
    from dpfast.report.metrics import result_table
    from dpfast.report.plots import write_report

    out = arguments.out or Path("runs") / recipe.name
    check_vacant(out, recipe, overwrite=arguments.overwrite, resume=arguments.resume)
    practice = DeliberatePractice(recipe)
    with RunFolder(out, recipe, overwrite=arguments.overwrite, resume=arguments.resume) as folder:
        results = practice.run(folder, progress=not arguments.quiet)
    write_report(out, results, practice.real.classes)
    print(f"\n{result_table(results)}\n\nRun folder with metrics, plots, contact sheets and learners: {out}")
    return 0
