"""The command line. Each command is a module whose ``add`` makes the command's parser and names its handler."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[Any]"
