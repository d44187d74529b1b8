"""The command line. Each command is a module whose ``add`` makes the command's parser and names its
handler.
"""

from __future__ import annotations

import argparse

from dpfast import launch


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--device`` to a command without a recipe's fields; its handler resolves it with
    ``dpfast.hardware.device``.
    """
    parser.add_argument(
        "--device",
        default="auto",
        help=f"where {what} run: cpu, cuda, cuda:1; auto: a GPU where there is one (default: auto)",
    )


def first() -> bool:
    """Whether this process speaks for all that torchrun started; without it every one does."""
    return launch.rank() == 0
