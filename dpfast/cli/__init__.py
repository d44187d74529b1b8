"""The command line. Each command is a module whose ``add`` makes the command's parser and names its
handler.
"""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

from dpfast import launch

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    """``--device`` of a command without a recipe's fields; its handler resolves it with
    ``dpfast.hardware.device``.
    """
    parser.add_argument(
        "--device",
        default="auto",
        help=f"of {what}: cpu, cuda, cuda:N, or auto, a GPU where there is one (default)",
    )


def first() -> bool:
    """Whether this process speaks for all that torchrun started; without it every one does."""
    return launch.rank() == 0
