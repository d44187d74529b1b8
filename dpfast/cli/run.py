"""``dpfast run``: a recipe, from its checks to its report."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpfast.cli import first
from dpfast.cli.parser import Commands
from dpfast.cli.recipes import add_recipe_command, recipe_of
from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.extras import require
from dpfast.logs import check_level, logged

log = logging.getLogger(__name__)
LAUNCH = ".launch"  # in a run's folder: which torchrun made it

if TYPE_CHECKING:
    from dpfast.parallel import Ranks
    from dpfast.planning.fitting import Fit
    from dpfast.pool.placement import Placement
    from dpfast.practice.experiment import DeliberatePractice
    from dpfast.practice.stopping import Stop


def add(commands: Commands) -> None:
    about = "train a classifier by Deliberate Practice, beside other sources of samples"
    parser = add_recipe_command(commands, "run", run, about)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder of the run (default: runs/RECIPE)"
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    kept.add_argument(
        "--resume",
        action="store_true",
        help="continue the run that --out holds from its last checkpoint",
    )
    parser.add_argument(
        "--branch-at",
        type=int,
        metavar="ROUND",
        help="continue a run that was made with --keep-rounds true from the end of this round "
        "without more additions",
    )
    parser.add_argument(
        "--branch-from",
        type=Path,
        metavar="FOLDER",
        help="that run's folder (default: runs/RECIPE)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the final table")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the plan and the memory for this machine, stop",
    )
    parser.add_argument(
        "--log-level",
        default="info",
        metavar="LEVEL",
        help="least level in logs/ of the run's folder: debug, info, warning or error (default: "
        "info)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: a rank without progress for so long is dead (default: 600)",
    )


def run(arguments: argparse.Namespace) -> int:
    recipe = recipe_of(arguments)
    require("matplotlib", "tensorboard")  # and not when the report is drawn, after the run
    check_level(arguments.log_level)
    if not arguments.timeout > 0:
        raise InputError(f"timeout = {arguments.timeout:g}: expected seconds above 0")

    from dpfast.parallel import RankError, process_group
    from dpfast.practice.stopping import LossError, Stop, Stopped

    with Stop() as stop:
        try:
            cuda = False if recipe.device == "cpu" else None
            with (
                process_group(cuda=cuda, timeout=arguments.timeout) as ranks,
                ranks.watched(lambda: stop.requested),
            ):
                return _run(arguments, recipe, stop, ranks)
        except Stopped:
            if first():
                print("stopped; the same command with --resume continues a run that has begun")
            return 0
        except LossError as error:
            if first():
                print(f"dpfast: error: {error}", file=sys.stderr)
        except RankError as error:
            if stop.requested:  # torchrun ends the group, and the others have gone already
                return 0
            print(f"dpfast: error: {error}", file=sys.stderr)
    return 1


def _run(arguments: argparse.Namespace, recipe: Recipe, stop: Stop, ranks: Ranks) -> int:
    with stop.at_once(), ranks.all_or_none():  # nothing is there to be saved
        from dpfast.errors import unsaved
        from dpfast.launch import launch_name
        from dpfast.parallel import versions
        from dpfast.practice.branch import prepare_branch
        from dpfast.practice.callbacks import LogCallback
        from dpfast.practice.changes import continued
        from dpfast.practice.experiment import DeliberatePractice
        from dpfast.practice.run_paths import (
            RunPaths,
            check_saving,
            check_shared,
            check_vacant,
        )
        from dpfast.practice.run_writer import RunWriter
        from dpfast.report.metrics import result_table
        from dpfast.report.page import write_report

        trunk = (
            Path("runs") / recipe.name if arguments.branch_from is None else arguments.branch_from
        )
        round, resume = arguments.branch_at, arguments.resume
        if round is None and arguments.branch_from is not None:
            raise InputError(
                "branch_from: names the run of a branch; say --branch-at ROUND as well"
            )
        if round is not None:
            recipe = replace(recipe, practice=replace(recipe.practice, sources=("dp",)))
        name = recipe.name if round is None else f"{recipe.name}-branch-{round}"
        out = arguments.out or Path("runs") / name
        resume = resume or (ranks.restarted and _begun(out, overwrite=arguments.overwrite))
    with stop.at_once():
        ranks.same("versions of dpfast and torch", versions())
        ranks.same("recipe", recipe.to_dict())
        asked = recipe
        with ranks.all_or_none():
            check_saving(recipe, resume=resume, branch=round is not None)
            if ranks.first:
                recipe = check_vacant(out, recipe, overwrite=arguments.overwrite, resume=resume)
                if round is not None and not resume:
                    recipe = continued(trunk, recipe, branch=True)
        recipe = Recipe.from_dict(ranks.broadcast_object(recipe.to_dict()))
        with ranks.all_or_none():
            practice = DeliberatePractice(recipe, ranks=ranks)
        if arguments.dry_run:
            with ranks.all_or_none():
                pool = practice.place_pool(out)
            return _dry_run(practice, pool, out) if ranks.first else 0
        with ranks.all_or_none():
            if round is not None and not resume and ranks.first:
                prepare_branch(
                    trunk, round, out, asked, overwrite=arguments.overwrite, beat=ranks.beat
                )
            resume = resume or round is not None
    with contextlib.ExitStack() as stack:
        with ranks.all_or_none():
            folder = RunPaths(out, practice.ranks)
            if ranks.first:
                folder = stack.enter_context(
                    RunWriter(
                        out,
                        asked,
                        overwrite=arguments.overwrite,
                        resume=resume,
                        ranks=practice.ranks,
                    )
                )
                (out / LAUNCH).write_text(launch_name())
        check_shared(out, ranks)
        stack.enter_context(logged(out, arguments.log_level))
        _tell_fit(practice.fit, aloud=ranks.first and not arguments.quiet)
        results = practice.run(
            folder, progress=not arguments.quiet, callbacks=[LogCallback()], stop=stop
        )
    if not ranks.first:
        return 0
    with (
        stop.at_once(),
        unsaved("the report is not complete", f"with room 'dpfast report {out}' makes it"),
    ):
        write_report([out], out, device=practice.pipeline.device)
    print(
        f"\n{result_table(results)}\n\nRun folder with metrics, plots, contact sheets and "
        f"learners: {out}"
    )
    return 0


def _tell_fit(fit: Fit | None, *, aloud: bool) -> None:
    """How the recipe was fitted to the memory, into the log and onto the screen."""
    for line in [] if fit is None else fit.lines():
        log.info(line.strip())
        if aloud:
            print(line)


def _begun(out: Path, *, overwrite: bool) -> bool:
    """Whether the ranks that torchrun has started again have begun their run."""
    from dpfast.launch import launch_name

    if not (out / "recipe.json").is_file():
        return False
    kept = out / LAUNCH  # says whether the run to be replaced was still there
    return not overwrite or (kept.is_file() and kept.read_text() == launch_name())


def _dry_run(practice: DeliberatePractice, pool: Placement, out: Path) -> int:
    """Everything has been checked: the generator is loaded, the real images are read, the learner
    has been tried.
    """
    from dpfast.planning.measure import measure
    from dpfast.planning.plan import plan
    from dpfast.planning.table import plan_table

    timings = measure(practice.recipe, pipeline=practice.pipeline)
    count = practice.ranks.size
    made = plan(practice.recipe, "here", count=count, timings=timings)
    made = replace(
        made, fit=replace(made.fit, pool=replace(pool, devices=count), proposals=())
    )  # as the run places it
    print(plan_table(made))
    print(f"\nNothing was written; without --dry-run the run begins in {out}")
    return 0
