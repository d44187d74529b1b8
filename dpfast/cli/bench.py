"""``dpfast bench``: the suites of ``benchmarks``, a folder of a checkout that wheels ship too."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dpfast.cli import Next
from dpfast.cli.parser import Commands, add_command
from dpfast.errors import InputError
from dpfast.extras import EXTRAS, require

PACKAGE = Path(__file__).resolve().parents[1]
OPERATIONS = ("ops", "pool", "loader")  # suites of parts of what another one measures whole


def add(commands: Commands) -> None:
    about = "measure beside eager PyTorch and torch.compile"
    example = "dpfast bench ops --only entropy"
    page = "records/results.md"
    parser = add_command(commands, "bench", bench, about, example=example, page=page)
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="what is measured: ops, pool, loader, sampler, learner, ...; one that is none lists "
        "all; dpfast bench ops --help tells its options",
    )
    options = parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the suite")
    options.required = False


def place() -> Path:
    """Returns the folder that holds ``benchmarks``: in a wheel ``dpfast/shipped``, where setup.py
    puts it, else the checkout.

    It goes first on the path of a process that measures, and of its children. So the benchmarks
    have one name everywhere, and no installation has them among its top-level packages. Raises
    ``InputError`` where there are none.
    """
    for folder in (PACKAGE / "shipped", PACKAGE.parent):
        if (folder / "benchmarks" / "run.py").is_file():
            return folder
    raise InputError(
        f"bench: there is no folder benchmarks beside {str(PACKAGE)!r} nor in it; "
        "install dpfast again"
    )


def bench(arguments: argparse.Namespace) -> int | Next:
    sys.path.insert(0, str(place()))
    try:
        from benchmarks.run import main as measure

        code = int(measure([arguments.suite, *arguments.options]))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            require(package)
        raise
    if code or arguments.suite not in OPERATIONS:
        return code
    return Next(("the whole sampler beside a naive one", ["dpfast", "bench", "sampler"]))
