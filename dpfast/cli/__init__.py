"""The command line. Each command is a module whose ``add`` makes the command's parser and names its
handler.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

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
    """Returns True if this process speaks for all that torchrun started; without it every one
    does.
    """
    return launch.rank() == 0


@dataclass(frozen=True)
class Next:
    """The end of a command that went well: the next sensible ones, each as what it is for and its
    words, which are printed as a shell takes them.

    ``Next(("the run", ["dpfast", "run", "fashion"]))``
    """

    steps: tuple[tuple[str, list[str]], ...]

    def __init__(self, *steps: tuple[str, list[str]]) -> None:
        object.__setattr__(self, "steps", steps)

    def tell(self) -> None:
        """Prints them on stderr: what is on stdout may be for a program."""
        for number, (purpose, words) in enumerate(self.steps):
            print(f"{'or' if number else 'Next'}, {purpose}:", file=sys.stderr)
            print(f"  {shlex.join(words)}", file=sys.stderr)


def without(words: list[str], *options: str) -> list[str]:
    """Returns the words of a command line without some options that have a value."""
    left, skip = [], False
    for word in words:
        if skip or word.partition("=")[0] in options:
            skip = not skip and "=" not in word
            continue
        left.append(word)
    return left


def vacant(path: Path) -> Path:
    """Returns ``path``, or with a number behind it, where nothing is there yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def page_of(path: Path) -> list[str]:
    """Returns a page as the address that a browser opens."""
    return [path.absolute().as_uri()]
