"""The command ``dpfast``: one module of this package for each of its commands.

An input that cannot work ends with one line on stderr and exit code 2, before any work starts. What
takes seconds to import (torch, diffusers, transformers) is imported by the handlers, after the
arguments are checked.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import select
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dpfast.cli import (
    Next,
    audit,
    bench,
    doctor,
    export,
    first,
    init,
    paper,
    plan,
    rehearse,
    report,
    run,
    sample,
    theory,
)
from dpfast.cli.parser import Parser
from dpfast.errors import InputError
from dpfast.version import __version__

WORDS = 5.0  # seconds
PACKAGE = Path(__file__).parents[1]
_PYTHONS = warnings.formatwarning
# as ``dpfast --help`` shows them, in the order of a first day
GROUPS = {
    "Start": (doctor, init, run),
    "Look at what was made": (sample, report, export),
    "Before devices are rented": (plan, rehearse),
    "Measure": (bench, audit),
    "The paper": (paper, theory),
}
EXAMPLES = """Examples:
  dpfast run fashion                    the loop in small, minutes on two cores
  dpfast init my.toml                   a recipe of your own to start from
  dpfast plan imagenet1k-sd15 --count 8

dpfast COMMAND --help tells a command's options, an example and where to read on. docs/index.md of \
the repository is where the documentation begins."""


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Returns a warning of dpfast as one line without its place in the source; those of others as
    Python shows them.
    """
    if category.__module__.startswith("dpfast.") or Path(filename).is_relative_to(PACKAGE):
        return f"dpfast: warning: {message}\n"
    return _PYTHONS(message, category, filename, lineno, line)


class _Program(Parser):
    """The parser of the whole line, whose help shows the commands in groups."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.groups: dict[str, Sequence[argparse.Action]] = {}

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        options = [action for action in self._actions if action.option_strings]
        for title, actions in [*self.groups.items(), ("options", options)]:
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def new_parser() -> Parser:
    """Returns the parser of the whole command line."""
    parser = _Program(
        prog="dpfast",
        usage="dpfast COMMAND ...",
        description="Deliberate Practice: a classifier and the diffusion generator that it steers.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--version", action="version", version=f"dpfast {__version__}", help="print the version"
    )
    commands = parser.add_subparsers(
        parser_class=Parser, prog="dpfast", dest="command", required=True, metavar="COMMAND"
    )
    for title, modules in GROUPS.items():
        before = len(commands._choices_actions)
        for command in modules:
            command.add(commands)
        parser.groups[title] = commands._choices_actions[before:]
    return parser


def _speak_utf8() -> None:
    """Starts this command anew in Python's UTF-8 mode where the locale has another encoding, in
    which names of files that a recipe gives could be neither found nor made.

    What is printed to a stream of another encoding is escaped rather than refused.
    """
    if sys.getfilesystemencoding() != "utf-8" and "utf8" not in sys._xoptions:
        os.environ["PYTHONUTF8"] = "1"  # for processes that this one starts
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code, 1 where nobody reads what it prints any more, as
    after ``dpfast ... | head``. Without ``arguments`` it is the process's own command.
    """
    try:
        try:
            return _main(arguments)
        finally:
            _flush()
    except BrokenPipeError:
        if not _unread():
            raise
        return 1


def _flush() -> None:
    """Prints what is still in the buffers."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _unread() -> bool:
    """Returns True if nobody reads what this command prints; it then prints nowhere, as Python
    would complain once more at its end.
    """
    left = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _left(stream)]
    for stream in left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(left)


def _left(stream: TextIO) -> bool:
    """Returns True if a stream is a pipe whose reader has left."""
    try:
        pipe = stream.fileno()
    except (OSError, ValueError):  # of a stream in memory, or a closed one
        return False
    poll = select.poll()
    poll.register(pipe, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _main(arguments: Sequence[str] | None) -> int:
    if arguments is None:
        _speak_utf8()
        # for recipes that name modules of their user's; last, so that it hides no package
        sys.path.append("")
    warnings.formatwarning = _warning
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        parsed = new_parser().parse_args(words)
        parsed.words = words
        done = parsed.handler(parsed)
        if not isinstance(done, Next):
            return int(done)
        if first():
            done.tell()
        return 0
    except InputError as error:
        if first():
            print(f"dpfast: error: {error}", file=sys.stderr)
        else:
            # torchrun ends all ranks with the first that leaves, and that shall be the one that
            # speaks
            time.sleep(WORDS)
        return 2
    except OSError as error:  # of a path, where nobody named it better
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        print(f"dpfast: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dpfast: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = _PYTHONS


if __name__ == "__main__":
    sys.exit(main())
