"""``dpfast report``: runs as one HTML page and PNG files."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli import Next, add_device, page_of
from dpfast.cli.parser import Commands, add_command
from dpfast.extras import require
from dpfast.terminal import say


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        run,
        "write a page on one or more runs",
        example="dpfast report runs/fashion runs/strong --out report",
        page="guides/one_gpu.md",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder, finished or not"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the page (default: RUN/report of the first run)",
    )
    parser.add_argument(
        "--study",
        type=Path,
        metavar="FILE",
        help="JSON lines of a study: source, samples, seed, test_accuracy",
    )
    parser.add_argument(
        "--accuracy",
        choices=("test", "validation"),
        default="test",
        help="the real images on which power laws of the error are fitted (default: test)",
    )
    parser.add_argument(
        "--group-by",
        action="append",
        metavar="FIELD",
        help="a field of the recipe by which runs of a source are told apart in those fits, or "
        "source alone; may be given more than once (default: all fields but sizes and seed)",
    )
    add_device(parser, "the learners and decoders that read the samples again")


def run(arguments: argparse.Namespace) -> Next:
    require("matplotlib")
    from dpfast.hardware.device import device_named
    from dpfast.report.page import write_report

    out, device = arguments.out or arguments.runs[0] / "report", device_named(arguments.device)
    page = write_report(
        arguments.runs,
        out,
        study=arguments.study,
        device=device,
        accuracy=arguments.accuracy,
        group_by=arguments.group_by,
        tell=say,
    )
    print(f"Report: {page}")
    return Next(("the page in a browser", page_of(page)))
