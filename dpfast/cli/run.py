"""``dpfast run``: a recipe and its rivals."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpfast.cli import Commands
from dpfast.cli.recipes import add_recipe, recipe_of
from dpfast.config import Recipe, RecipeError
from dpfast.logs import check_level, logged

if TYPE_CHECKING:
    from dpfast.practice.stopping import Stop


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "run", help="train a classifier by Deliberate Practice, beside its rivals", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, help="folder of the run; default runs/RECIPE")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    kept.add_argument(
        "--resume", action="store_true", help="continue the run that --out holds from its last checkpoint"
    )
    parser.add_argument(
        "--branch-at", type=int, metavar="ROUND",
        help="continue a run that was made with --keep-rounds true from the end of this round without more additions",
    )  # fmt: skip
    parser.add_argument("--branch-from", type=Path, metavar="RUN", help="that run's folder; default runs/RECIPE")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the final table")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan and the memory for this machine, stop"
    )
    parser.add_argument("--log-level", default="info", help="of logs/ in the run's folder: debug, info, warning, error")
    add_recipe(parser)
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    check_level(arguments.log_level)

    from dpfast.practice.stopping import LossError, Stop, Stopped

    try:
        with Stop() as stop:
            return _run(arguments, recipe, stop)
    except Stopped:
        print("stopped; the same command with --resume continues a run that has begun")
        return 0
    except LossError as error:
        print(f"dpfast: error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, recipe: Recipe, stop: Stop) -> int:
    with stop.at_once():  # nothing is there to be saved
        from dpfast.practice.branch import prepare_branch
        from dpfast.practice.experiment import DeliberatePractice
        from dpfast.practice.journal import Journal
        from dpfast.practice.run_folder import RunFolder, check_vacant
        from dpfast.report.metrics import result_table
        from dpfast.report.page import write_report

        trunk = Path("runs") / recipe.name if arguments.branch_from is None else arguments.branch_from
        round, resume = arguments.branch_at, arguments.resume
        if round is None and arguments.branch_from is not None:
            raise RecipeError("branch_from: names the run of a branch; say --branch-at ROUND as well")
        if round is not None:
            recipe = replace(recipe, practice=replace(recipe.practice, sources=("dp",)))
        name = recipe.name if round is None else f"{recipe.name}-branch-{round}"
        out = arguments.out or Path("runs") / name
        check_vacant(out, recipe, overwrite=arguments.overwrite, resume=resume)
        practice = DeliberatePractice(recipe)
        if arguments.dry_run:
            return _dry_run(recipe, out)
        if round is not None and not resume:
            prepare_branch(trunk, round, out, recipe, overwrite=arguments.overwrite)
            resume = True
    with (
        RunFolder(out, recipe, overwrite=arguments.overwrite, resume=resume) as folder,
        logged(out, arguments.log_level),
    ):
        results = practice.run(folder, progress=not arguments.quiet, callbacks=[Journal()], stop=stop)
    with stop.at_once():
        write_report([out], out)
    print(f"\n{result_table(results)}\n\nRun folder with metrics, plots, contact sheets and learners: {out}")
    return 0


def _dry_run(recipe: Recipe, out: Path) -> int:
    """Everything has been checked: the generator is loaded, the real images are read, the learner has been tried."""
    from dpfast.roofline.measure import measure
    from dpfast.roofline.plan import plan
    from dpfast.roofline.table import plan_table

    print(plan_table(plan(recipe, "here", timings=measure(recipe))))
    print(f"\nNothing was written; without --dry-run the run begins in {out}")
    return 0
