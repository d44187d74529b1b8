"""``dpfast report``: runs as one HTML page and PNG files."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfast.cli import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("report", help="write a page on one or more runs", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, finished or not")
    parser.add_argument("--out", type=Path, help="folder of the page; default RUN/report of the first run")
    parser.add_argument("--study", type=Path, help="JSON lines of a study: source, samples, seed, test_accuracy")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from dpfast.report.page import write_report

    page = write_report(arguments.runs, arguments.out or arguments.runs[0] / "report", study=arguments.study)
    print(f"Report: {page}")
    return 0
