"""``dpfast audit``: the Triton kernels compiled for GPUs and read, without a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dpfast.cli import Next
from dpfast.cli.parser import Commands, add_command
from dpfast.errors import InputError
from dpfast.terminal import say


def add(commands: Commands) -> None:
    about = "compile the Triton kernels and check their code; needs no GPU"
    example = "dpfast audit --capability 90"
    page = "records/numerics.md"
    parser = add_command(commands, "audit", audit, about, example=example, page=page)
    parser.add_argument(
        "--capability",
        type=int,
        nargs="+",
        choices=(80, 90, 100),
        default=[80, 90, 100],
        help="80: A100, 90: H100, 100: B200 (default: all)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="file for the reports, one JSON object a line",
    )


def audit(arguments: argparse.Namespace) -> int | Next:
    from dpfast.ops.audit import audit as compile_all
    from dpfast.ops.audit import missing, problems, record, table

    if reason := missing():
        raise InputError(reason)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(
            f"json = {str(arguments.json)!r}: no folder {str(arguments.json.parent)!r}"
        )
    reports = compile_all(capabilities=arguments.capability)
    if arguments.json is not None:
        arguments.json.write_text(
            "".join(f"{json.dumps(record(report))}\n" for report in reports), encoding="utf-8"
        )
    broken = sum(bool(problems(report)) for report in reports)
    say(
        f"{table(reports)}\n\n{len(reports) - broken} of {len(reports)} kernels keep their promises"
    )
    if broken:
        return 1
    return Next(("what the kernels gain on this machine", ["dpfast", "bench", "ops"]))
