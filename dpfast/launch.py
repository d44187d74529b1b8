"""Facts about the launch of this process, from the environment that torchrun gives it.

Without torchrun a process is alone: rank 0 of 1, started once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of this process among all of the run, from 0."""
    return int(environ.get("RANK", "0"))


def world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of processes of the run."""
    return int(environ.get("WORLD_SIZE", "1"))


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of this process among those of its machine, from 0."""
    return int(environ.get("LOCAL_RANK", "0"))


def local_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of processes of the run on this machine."""
    return int(environ.get("LOCAL_WORLD_SIZE", "1"))


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of times that torchrun has started this machine's processes again after
    one of them failed.
    """
    return int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def max_restarts(environ: Mapping[str, str] = os.environ) -> int:
    """Returns the number of times that torchrun may start the processes again."""
    return int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def launch_name(environ: Mapping[str, str] = os.environ) -> str:
    """Returns a name for one call of torchrun, the same on all machines and over its restarts.

    Empty without torchrun. A call without ``--rdzv-id`` is named by its machine and process.
    """
    name = environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name
