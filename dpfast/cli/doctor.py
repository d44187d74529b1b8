"""``dpfast doctor``: what is installed and what is missing."""

from __future__ import annotations

import argparse

from dpfast.cli import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor", help="what is installed, which backend each operation uses, what is missing"
    )
    parser.set_defaults(handler=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    from dpfast.report.doctor import report

    print(report())
    return 0
