"""The command ``dpfast``: one module of this package for each of its commands.

An input that cannot work ends with one line on stderr and exit code 2, before any work starts. What
takes seconds to import (torch, diffusers, transformers) is imported by the handlers, after the
arguments are checked.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dpfast.cli import (
    audit,
    bench,
    doctor,
    export,
    first,
    plan,
    rehearse,
    report,
    run,
    sample,
    theory,
)
from dpfast.errors import InputError

WORDS = 5.0  # seconds
PACKAGE = Path(__file__).parents[1]
_PYTHONS = warnings.formatwarning
COMMANDS = (run, plan, rehearse, report, sample, audit, bench, export, doctor, theory)


class _Parser(argparse.ArgumentParser):
    """Reports an unusable argument in one line, with the nearest option of the same command."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As of ``ArgumentParser``, for the whole line and for each command; nothing unknown is
        left over.
        """
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0].replace("_", "-")
            known = [option.removeprefix("--") for option in self._option_string_actions]
            sections = [option for option in known if option.endswith(f".{name}")]
            if sections:
                choice = " or ".join(f"--{option}" for option in sections)
                raise InputError(f"--{name}: several sections have it; say {choice}")
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean --{near[0]}?" if near else f"{self.prog} --help lists what is known"
            )
            raise InputError(f"{unknown[0]}: no such option of {self.prog}; {hint}")
        return parsed, unknown


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning of dpfast as one line without its place in the source; those of others as Python
    shows them.
    """
    if category.__module__.startswith("dpfast.") or Path(filename).is_relative_to(PACKAGE):
        return f"dpfast: warning: {message}\n"
    return _PYTHONS(message, category, filename, lineno, line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _Parser(
        prog="dpfast", description="Deliberate Practice on synthetic images.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    warnings.formatwarning = _warning
    try:
        parsed = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
        return int(parsed.handler(parsed))
    except InputError as error:
        if first():
            print(f"dpfast: error: {error}", file=sys.stderr)
        else:
            time.sleep(
                WORDS
                # torchrun ends all ranks with the first that leaves, and that shall be the one that
                # speaks
            )
        return 2
    except KeyboardInterrupt:
        print("dpfast: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = _PYTHONS


if __name__ == "__main__":
    sys.exit(main())
