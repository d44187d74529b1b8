"""``dpfast bench``: the suites of the ``benchmarks`` folder, which is part of a checkout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dpfast.cli.parser import Commands, add_command
from dpfast.errors import InputError


def add(commands: Commands) -> None:
    about = "measure beside eager PyTorch and torch.compile"
    parser = add_command(commands, "bench", bench, about)
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help="ops, pool, ...; dpfast bench ops --help lists the options",
    )
    options = parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the suite")
    options.required = False


def bench(arguments: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise InputError(
            "bench: the benchmarks are part of a checkout; "
            "clone the repository and pip install -e it"
        )
    sys.path.insert(0, str(root))
    from benchmarks.run import main as measure

    return int(measure([arguments.suite, *arguments.options]))
