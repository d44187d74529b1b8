"""The command line. Each command is a module whose ``add`` makes the command's parser and names its handler."""

from __future__ import annotations

import argparse
import os
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[Any]"


def first() -> bool:
    """Whether this process speaks for all that torchrun started; without it every one does."""
    return os.environ.get("RANK", "0") == "0"
