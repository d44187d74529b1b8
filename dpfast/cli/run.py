"""``dpfast run``: a recipe, from its checks to its report."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpfast import launch
from dpfast.cli import Next, first, page_of, vacant
from dpfast.cli.parser import Commands
from dpfast.cli.recipes import (
    add_recipe_command,
    guiding_words,
    launched,
    recipe_of,
    recipe_words,
)
from dpfast.cli.sample import FIELDS
from dpfast.config import RECIPE_FILE, Recipe
from dpfast.errors import InputError
from dpfast.extras import require
from dpfast.files import there
from dpfast.logs import check_level, logged
from dpfast.terminal import say, width

log = logging.getLogger(__name__)
LAUNCH = ".launch"  # in a run's folder: which torchrun made it
RUNS = Path("runs")
PAGE = 7  # further runs on one page, where the next command names them

if TYPE_CHECKING:
    from dpfast.parallel import Ranks
    from dpfast.planning.fitting import Fit
    from dpfast.practice.experiment import DeliberatePractice
    from dpfast.practice.stopping import Stop


def add(commands: Commands) -> None:
    about = "train by Deliberate Practice, beside other sources of samples"
    example = "dpfast run fashion --omega 0.2 --out runs/strong"
    parser = add_recipe_command(commands, "run", run, about, example=example, page="quickstart.md")
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
        help="least level in logs/ of the run's folder: "
        "debug, info, warning or error (default: info)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: a rank without progress for so long is dead (default: 600)",
    )


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """The request of a call of ``dpfast run``, by its arguments alone.

    round: the end of which round of the run in ``trunk`` a branch leaves; None for no branch.
    """

    recipe: Recipe
    out: Path
    trunk: Path
    round: int | None
    overwrite: bool
    resume: bool
    dry_run: bool
    quiet: bool
    log_level: str
    timeout: float


def resolve(arguments: argparse.Namespace) -> RunSpec:
    """Returns what the arguments ask for. Raises ``InputError`` where they do not fit together."""
    recipe, round = recipe_of(arguments), arguments.branch_at
    if not arguments.timeout > 0:
        raise InputError(f"timeout = {arguments.timeout:g}: expected seconds above 0")
    if round is None and arguments.branch_from is not None:
        raise InputError("branch_from: names the run of a branch; say --branch-at ROUND as well")
    name = recipe.name
    if round is not None:
        name = f"{name}-branch-{round}"
        recipe = replace(recipe, practice=replace(recipe.practice, sources=("dp",)))
    return RunSpec(
        recipe=recipe,
        out=arguments.out or RUNS / name,
        trunk=arguments.branch_from or RUNS / recipe.name,
        round=round,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        quiet=arguments.quiet,
        log_level=check_level(arguments.log_level),
        timeout=arguments.timeout,
    )


def run(arguments: argparse.Namespace) -> int | Next:
    """Runs on every rank, and returns the exit code: 0 also for a run that was stopped."""
    spec = resolve(arguments)
    # and not when the report is drawn, after the run
    require("matplotlib", *spec.recipe.tracker_packages)

    from dpfast.parallel import RankError, process_group
    from dpfast.practice.stopping import LossError, Stop, Stopped

    with Stop() as stop:
        try:
            cuda = False if spec.recipe.device == "cpu" else None
            with (
                process_group(cuda=cuda, timeout=spec.timeout) as ranks,
                ranks.watched(lambda: stop.requested),
            ):
                execute(spec, stop, ranks)
            return 0 if spec.quiet else _next(arguments, spec)
        except Stopped:
            if first():
                print("stopped; the same command with --resume continues a run that has begun")
            return 0 if spec.quiet or not there(spec.out / RECIPE_FILE) else _resumed(arguments)
        except LossError as error:
            if first():
                print(f"dpfast: error: {error}", file=sys.stderr)
        except RankError as error:
            if stop.requested:  # torchrun ends the group, and the others have gone already
                return 0
            print(f"dpfast: error: {error}", file=sys.stderr)
    return 1


def _next(arguments: argparse.Namespace, spec: RunSpec) -> Next:
    """Returns the next commands: after a dry run the run; after a run its page, the learner's
    images, and other runs.
    """
    if spec.dry_run:
        words = [word for word in arguments.words if word != "--dry-run"]
        return Next(("the run", [*launched(launch.world_size()), *words]))
    recipe, out = spec.recipe, spec.out
    page = out / "index.html"
    steps = [("the page of this run in a browser", page_of(page))]
    if not there(page):  # the disk was full
        steps = [("the page of this run", ["dpfast", "report", str(out)])]
    if recipe.practice.generates:
        words = recipe_words(arguments, *FIELDS, "guidance.anchor")
        words = words[1:] if words[0] == "fashion" else ["--recipe", *words]
        words += ["--learner", str(out), "--labels", "0,1", *guiding_words(arguments, recipe)]
        words += ["--out", str(vacant(out.with_name(f"{out.name}-samples")))]
        steps.append(("images that its learner guides", ["dpfast", "sample", *words]))
    runs = _runs_beside(out)
    if len(runs) > 1:
        words = [*runs, "--out", str(out.parent / "report")]
        steps.append(("the runs on one page", ["dpfast", "report", *words]))
    return Next(*steps)


def _resumed(arguments: argparse.Namespace) -> Next:
    words = [word for word in arguments.words if word not in ("--overwrite", "--resume")]
    return Next(("the rest of it", [*launched(launch.world_size()), *words, "--resume"]))


def _runs_beside(out: Path) -> list[str]:
    """Returns the folder of a run, and those of others beside it."""
    try:
        found = [each.parent for each in out.parent.glob(f"*/{RECIPE_FILE}")]
    except OSError:
        return [str(out)]
    return [str(out), *sorted(str(each) for each in found if each.name != out.name)[:PAGE]]


def execute(spec: RunSpec, stop: Stop, ranks: Ranks) -> None:
    """Does what ``spec`` asks for on this rank.

    Nothing is written before all ranks have checked everything.
    """
    from dpfast.launch import launch_name
    from dpfast.parallel import versions
    from dpfast.practice.branch import prepare_branch
    from dpfast.practice.callbacks import LogCallback
    from dpfast.practice.experiment import DeliberatePractice
    from dpfast.practice.run_paths import RunPaths, check_shared
    from dpfast.practice.run_writer import RunWriter
    from dpfast.report.metrics import result_table

    with stop.at_once():  # nothing is there to be saved
        ranks.same("versions of dpfast and torch", versions())
        ranks.same("recipe", spec.recipe.to_dict())
        with ranks.all_or_none():
            goes_on = spec.resume or (ranks.restarted and _begun(spec))
        branch_at = None if goes_on else spec.round
        recipe = _fetched(_begun_with(spec, ranks, goes_on=goes_on), ranks)
        found = recipe.generator
        revised = replace(
            spec.recipe.generator,
            revision=found.revision,
            tiny_decoder=found.tiny_decoder,
            lora=found.lora,
        )
        spec = replace(spec, recipe=replace(spec.recipe, generator=revised))
        with ranks.all_or_none():
            practice = DeliberatePractice(recipe, ranks=ranks)
        if spec.dry_run:
            _dry_run(spec, practice, ranks)
            return
        with ranks.all_or_none():
            if branch_at is not None and ranks.first:
                prepare_branch(
                    spec.trunk,
                    branch_at,
                    spec.out,
                    spec.recipe,
                    overwrite=spec.overwrite,
                    beat=ranks.beat,
                )
    with contextlib.ExitStack() as stack:
        with ranks.all_or_none():
            folder = RunPaths(spec.out, practice.ranks)
            if ranks.first:
                writer = RunWriter(
                    spec.out,
                    spec.recipe,
                    overwrite=spec.overwrite,
                    # a branch goes on in the folder that was prepared for it
                    resume=goes_on or branch_at is not None,
                    ranks=practice.ranks,
                )
                folder = stack.enter_context(writer)
                (spec.out / LAUNCH).write_text(launch_name(), encoding="utf-8")
        check_shared(spec.out, ranks)
        stack.enter_context(logged(spec.out, spec.log_level))
        _tell_fit(practice.fit, aloud=ranks.first and not spec.quiet)
        told = [LogCallback()]
        results = practice.run(folder, progress=not spec.quiet, callbacks=told, stop=stop)
    if ranks.first:
        with stop.at_once():
            _report(spec.out, practice)
        print(
            f"\n{result_table(results, width())}\n\nRun folder with metrics, plots, contact sheets "
            f"and learners: {spec.out}"
        )


def _begun_with(spec: RunSpec, ranks: Ranks, *, goes_on: bool) -> Recipe:
    """Returns the recipe with which the run begins or goes on, the same one on every rank."""
    from dpfast.learn.pretrained import as_kept
    from dpfast.practice.changes import continued
    from dpfast.practice.run_paths import check_saving, check_vacant

    recipe, branches = spec.recipe, spec.round is not None
    with ranks.all_or_none():
        check_saving(recipe, resume=goes_on, branch=branches)
        if ranks.first:
            recipe = check_vacant(spec.out, recipe, overwrite=spec.overwrite, resume=goes_on)
            if branches and not goes_on:
                recipe = as_kept(continued(spec.trunk, recipe, branch=True), spec.trunk)
            if goes_on:
                recipe = as_kept(recipe, spec.out)
    return Recipe.from_dict(ranks.broadcast_object(recipe.to_dict()))


def _fetched(recipe: Recipe, ranks: Ranks) -> Recipe:
    """Returns the recipe with the commits of its generator on the Hub, which is in the cache of
    each machine: rank 0 downloads what is lacking, and one rank of each machine with another cache.
    """
    from dpfast.generate.from_recipe import fetched

    if not recipe.practice.generates:
        return recipe

    def with_commit() -> Recipe:
        return replace(recipe, generator=fetched(recipe.generator, beat=ranks.beat))

    with ranks.all_or_none():
        if ranks.first:
            recipe = with_commit()
    recipe = Recipe.from_dict(ranks.broadcast_object(recipe.to_dict()))
    with ranks.all_or_none():
        if ranks.local_rank == 0 and not ranks.first:
            recipe = with_commit()
    return recipe


def _begun(spec: RunSpec) -> bool:
    """Returns True if the ranks that torchrun has started again have begun their run."""
    from dpfast.launch import launch_name

    if not there(spec.out / RECIPE_FILE):
        return False
    kept = spec.out / LAUNCH  # says whether the run to be replaced was still there
    return not spec.overwrite or (
        kept.is_file() and kept.read_text(encoding="utf-8") == launch_name()
    )


def _report(out: Path, practice: DeliberatePractice) -> None:
    """Writes the report; where the disk refuses it, a warning names the command that makes it."""
    from dpfast.errors import unsaved
    from dpfast.report.page import write_report

    with unsaved("the report is not complete", f"with room 'dpfast report {out}' makes it"):
        write_report([out], out, device=practice.pipeline.device)


def _tell_fit(fit: Fit | None, *, aloud: bool) -> None:
    """Says how the recipe was fitted to the memory, in the log and on the screen."""
    for line in [] if fit is None else fit.lines():
        log.info(line.strip())
        if aloud:
            say(line)


def _dry_run(spec: RunSpec, practice: DeliberatePractice, ranks: Ranks) -> None:
    """Times the stages and prints the plan: the generator is loaded, the real images are read, the
    learner has been tried.
    """
    from dpfast.planning.measure import measure
    from dpfast.planning.plan import plan
    from dpfast.planning.table import plan_table

    with ranks.all_or_none():
        pool = practice.place_pool(spec.out)
    if not ranks.first:
        return
    timings = measure(practice.recipe, pipeline=practice.pipeline)
    count = practice.ranks.size
    made = plan(practice.recipe, "here", count=count, timings=timings)
    # the pool as the run places it
    placed = replace(made.fit, pool=replace(pool, devices=count), proposals=())
    say(plan_table(replace(made, fit=placed), width()))
    print(f"\nNothing was written; without --dry-run the run begins in {spec.out}")
