"""``dpfast paper``: a table or figure of the paper, from its runs to the page that compares."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpfast.cli import Next, page_of
from dpfast.cli.parser import Commands, add_command, at_least
from dpfast.errors import InputError
from dpfast.extras import require
from dpfast.files import is_folder
from dpfast.terminal import say

if TYPE_CHECKING:
    from dpfast.paper.definition import Table
    from dpfast.paper.runs import Folders, PaperRun

FOLDERS = ("validation", "held_out", "real")


def add(commands: Commands) -> None:
    about = "a table or figure of the paper, made and compared"
    example = "dpfast paper table4 --small --dry-run"
    page = "guides/reproduce_paper.md"
    parser = add_command(commands, "paper", run, about, example=example, page=page)
    parser.add_argument(
        "table",
        nargs="?",
        metavar="TABLE",
        help="table4, figure5, ...; without one they are listed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of all its runs and of the page (default: runs/paper/TABLE, with -small)",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="the same structure of runs with the embedded generator, minutes on two cores",
    )
    parser.add_argument(
        "--seeds", metavar="N,...", help="seeds of each run (default: those of the table)"
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--dry-run",
        action="store_true",
        help="print the command of each run with hours and disk, and the folders it needs; stop",
    )
    kept.add_argument(
        "--page", action="store_true", help="write the page of the runs that are there; make none"
    )
    parser.add_argument(
        "--pipeline",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="the generator, or its id at the Hub; where a table compares several, given for each "
        "with its NAME",
    )
    parser.add_argument("--validation", metavar="FOLDER", help="real images that drive the runs")
    parser.add_argument("--held-out", metavar="FOLDER", help="real images for the final test")
    parser.add_argument("--real", metavar="FOLDER", help="real images for rows that train on them")
    parser.add_argument(
        "--evaluation",
        metavar="[NAME=]FOLDER,...",
        help="further sets: imagenet-v2=FOLDER, imagenet-sketch, imagenet-r, imagenet-a",
    )
    parser.add_argument(
        "--launch",
        metavar="COMMAND",
        help="what starts a run, as 'torchrun --nproc-per-node 8 -m dpfast' (default: this dpfast)",
    )
    parser.add_argument(
        "--device",
        default="h100",
        metavar="GPU",
        help="of --dry-run, as of dpfast plan: what the hours are about; in small this machine is "
        "measured (default: h100)",
    )
    parser.add_argument(
        "--count",
        type=at_least(1),
        default=8,
        metavar="N",
        help="of --dry-run: how many of them (default: 8)",
    )


def run(arguments: argparse.Namespace) -> int | Next:
    from dpfast.paper.definition import load_table, names

    if arguments.table is None:
        _list(names())
        return Next(
            ("the runs of one, made small", ["dpfast", "paper", "table4", "--small", "--dry-run"])
        )
    table = load_table(arguments.table, small=arguments.small)

    from dpfast.paper.making import launch_words, make_others, make_runs
    from dpfast.paper.runs import claim, lacking, paper_runs

    out = arguments.out or Path("runs/paper") / f"{table.name}{'-small' * arguments.small}"
    seeds = _seeds(arguments.seeds, table)
    runs = paper_runs(table, out, seeds, _folders(arguments, table))
    if arguments.dry_run:
        _dry_run(table, runs, seeds[0], out, arguments)
        words = [word for word in arguments.words if word != "--dry-run"]
        return Next(("these runs and their page", ["dpfast", *words, *_needed(lacking(runs))]))
    require("matplotlib", "tensorboard")
    from dpfast.paper.page import write_page
    from dpfast.practice.run_writer import owned

    missing = lacking(runs)
    if missing and not arguments.page:
        raise InputError(
            f"table = {table.name!r}: needs folders of yours, say {' '.join(_needed(missing))}"
        )
    own = [sys.executable, "-m", "dpfast"]
    launch = own if arguments.launch is None else launch_words(arguments.launch)
    claim(table, runs, out, small=arguments.small)
    code = 0
    if not arguments.page:
        owner = owned(out)
        try:
            code = make_runs(runs, launch, print)
            code = code or make_others(table.commands, out, _pipeline(runs), seeds[0], own, print)
        finally:
            owner.close()
    page = write_page(table, runs, out)
    print(f"Page: {page}")
    return code or Next(("the page in a browser", page_of(page)))


def _list(names: dict[str, str]) -> None:
    from dpfast.paper.definition import load_table

    width = max(map(len, names))
    for name, defined in names.items():
        also = "" if name == defined else f" (the runs of {defined})"
        say(f"{name.ljust(width)}  {load_table(name).title}{also}")


def _seeds(text: str | None, table: Table) -> tuple[int, ...]:
    if text is None:
        return table.seeds
    wanted = "expected whole numbers of at least 0 with commas, each once"
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise InputError(f"seeds = {text!r}: {wanted}")
    seeds = tuple(map(int, words))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds = {text!r}: {wanted}")
    return seeds


def _folders(arguments: argparse.Namespace, table: Table) -> Folders:
    """Returns the folders of the command line, each a folder that is there."""
    from dpfast.config import Recipe
    from dpfast.generate.pipelines.hub import is_model_id
    from dpfast.paper.runs import PLACES, Folders

    given = {name: value for name in FOLDERS if (value := getattr(arguments, name)) is not None}
    for name, value in given.items():
        _check_folder(name.replace("_", "-"), value)
    if arguments.evaluation is not None:
        given["evaluation"] = arguments.evaluation
    recipes = [Recipe.load(entry.recipe, **entry.fields) for entry in table.runs]
    places = dict.fromkeys(r.generator.pipeline for r in recipes)
    generators = [name for name in places if name in PLACES["pipeline"]]
    pipelines: dict[str, str] = {}
    for text in arguments.pipeline:
        name, _, folder = text.partition("=")
        if name not in generators or not folder:
            name, folder = "", text
        if not is_model_id(folder):
            _check_folder("pipeline", folder)
        if not name and len(generators) > 1:
            each = " ".join(f"--pipeline {known}=FOLDER" for known in generators)
            raise InputError(f"pipeline = {text!r}: {table.name} compares generators, say {each}")
        if name in pipelines:
            raise InputError(f"pipeline = {text!r}: given twice")
        pipelines[name] = folder
    return Folders(given=given, pipelines=pipelines)


def _check_folder(option: str, value: str) -> None:
    if not is_folder(Path(value)):
        raise InputError(f"{option} = {value!r}: no such folder")


def _pipeline(runs: Sequence[PaperRun]) -> str:
    """Returns the generator of a table that has one, as a command names it."""
    if not runs:
        return ""
    name = runs[0].recipe.generator.pipeline
    return f"FOLDER-OF-{name}" if "pipeline" in runs[0].lacking else name


def _needed(missing: dict[str, list[str]]) -> list[str]:
    """Returns the options that name what is missing."""
    options: list[str] = []
    for option, values in missing.items():
        several = option == "pipeline" and len(values) > 1
        for value in values if several else values[:1]:
            options += [f"--{option}", f"{value}=FOLDER" if several else "FOLDER"]
    return options


def _dry_run(
    table: Table, runs: Sequence[PaperRun], seed: int, out: Path, arguments: argparse.Namespace
) -> None:
    from dpfast.hardware.peaks import HERE
    from dpfast.paper.cost import costs_of
    from dpfast.paper.making import words_of
    from dpfast.paper.runs import lacking
    from dpfast.planning.measure import measure
    from dpfast.pool.memory_tiers import readable

    here = arguments.small or arguments.device.lower() == HERE
    device, count = (HERE, 1) if here else (arguments.device, arguments.count)
    timings = measure(runs[0].recipe) if here and runs else None
    costs = costs_of(runs, device, count, timings)
    print(f"# {table.name}: {table.title}")
    for made, cost in zip(runs, costs, strict=True):
        at_most = "at most " if made.entry.branch is not None else ""
        price = cost.why or f"{at_most}{_time(cost.hours)}, {readable(cost.disk)}"
        print(f"\n# {made.name}: {made.state}; makes {cost.made:,} samples, {price}")
        print(made.command)
    for other in table.commands:
        words = words_of(other, out, _pipeline(runs), seed)
        print(f"\n# {other.name}\n{shlex.join(['dpfast', *words])}")
    for entry in table.entries:
        if entry.left_out:
            print(f"\n# {entry.name} ({entry.row}) stays out: {entry.left_out}")
    hours, disk = sum(cost.hours for cost in costs), sum(cost.disk for cost in costs)
    on = "this machine" if here else f"{count} x {device.upper()}"
    each = f", {hours * count:,.1f} device hours" if count > 1 else ""
    print(
        f"\n# {len(runs)} runs: {sum(cost.made for cost in costs):,} samples, {_time(hours)} on "
        f"{on}{each}, {readable(disk)} in {out}"
    )
    missing = lacking(runs)
    if missing:
        print(f"# needs folders of yours: {' '.join(_needed(missing))}")
    further = [name for name in table.measures if name not in ("validation", "held-out")]
    if further and not arguments.small:
        sets = ",".join(f"{name}=FOLDER" for name in further)
        print(f"# for its other columns: --evaluation {sets}")
    if "held-out" in table.measures and not arguments.small:
        print("# for its held-out column: --held-out FOLDER, ImageNet's training images")


def _time(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
