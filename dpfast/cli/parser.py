"""The parser of every command: one-line errors, and help that is laid out for reading."""

from __future__ import annotations

import argparse
import difflib
import math
import shutil
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from dpfast.cli import Next
from dpfast.errors import InputError

DOCS = "docs"
WIDEST = 120  # columns of a help text
Commands: TypeAlias = "argparse._SubParsersAction[Any]"


class HelpFormatter(argparse.HelpFormatter):
    """A layout that names an option once, by its shortest spelling, and leaves the words beside it
    two thirds of the line.
    """

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, WIDEST)
        super().__init__(prog, max_help_position=width // 3, width=width - 1)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, (action.dest or "").upper())
        return f"{min(action.option_strings, key=len)} {value}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # lines that are indented are examples, and stay as they are
        return "\n".join(
            line
            if line.startswith(" ")
            else textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
            for line in text.split("\n")
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        # an option that is named in the text stays whole
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser that raises an ``InputError`` of one line for an unusable argument: it names the
    argument, its value and what would be right, and for an unknown option the nearest one of the
    same command.
    """

    # of a command: a whole command line, and a page of docs; empty where there is none
    example = page = ""

    def __init__(self, **options: Any) -> None:
        options = {"formatter_class": HelpFormatter} | options
        super().__init__(allow_abbrev=False, exit_on_error=False, **options)
        self.register("type", int, whole)
        self.register("type", float, finite)

    def error(self, message: str) -> NoReturn:
        lacking = message.removeprefix("the following arguments are required: ")
        if lacking != message:
            message = f"{self.prog} needs {lacking}; {self.prog} --help tells what they are"
        raise InputError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parses as ``ArgumentParser`` does, the whole line and each command; nothing unknown is
        left over.
        """
        try:
            parsed, unknown = super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            if error.argument_name is None:
                self.error(error.message)
            name = min(error.argument_name.split("/"), key=len)
            words = error.message.replace("argument -", "-").replace("one argument", "a value")
            words = words.replace("ignored explicit argument", "takes no value, got")
            raise InputError(f"{name}: {words}") from None
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0].replace("_", "-")
            known = [each.removeprefix("--") for each in self._option_string_actions]
            sections = [each for each in known if each.endswith(f".{name}")]
            if len(sections) > 1:
                choice = " or ".join(f"--{each}" for each in sections)
                raise InputError(f"--{name}: several sections have it; say {choice}")
            same = [each for each in (name, name.rpartition(".")[2]) if each in known]
            option = unknown[0].startswith("-")
            near = same or (difflib.get_close_matches(name, known, n=1) if option else [])
            hint = (
                f"did you mean --{near[0]}?" if near else f"{self.prog} --help lists what is known"
            )
            kind = "option" if option else "argument"
            raise InputError(f"{unknown[0]}: no such {kind} of {self.prog}; {hint}")
        return parsed, unknown

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kind = self._registry_get("type", action.type, action.type)
        try:
            return kind(arg_string)
        except argparse.ArgumentTypeError as error:
            number = arg_string.removeprefix("-").isdecimal()
            value = arg_string if number else repr(arg_string)
            raise InputError(f"{action.dest} = {value}: {error}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            near = difflib.get_close_matches(str(value), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            words = f"expected one of {', '.join(known)}"
            raise InputError(f"{action.dest} = {value!r}: {words}{hint}")


def whole(text: str) -> int:
    """Reads an argument of the type ``int``."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError("expected a whole number") from None


def finite(text: str) -> float:
    """Reads an argument of the type ``float``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError("expected a finite number")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """Returns the type of an argument that is a whole number of ``least`` or more."""

    def kind(text: str) -> int:
        words = f"expected a whole number of at least {least}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(words) from None
        if value < least:
            raise argparse.ArgumentTypeError(words)
        return value

    return kind


def in_one_line(prog: str, call: Callable[[], int]) -> int:
    """Runs ``call`` and returns its exit code; for an ``InputError`` 2, after one line on
    stderr.
    """
    try:
        return call()
    except InputError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2


def add_command(
    commands: Commands,
    name: str,
    handler: Callable[[argparse.Namespace], int | Next],
    help: str,
    *,
    example: str,
    page: str,
    **options: Any,
) -> Parser:
    """Adds a command. help: what it does, a phrase; example: a whole command line; page: of the
    documentation, a path in ``docs``; options: of ``ArgumentParser``.
    """
    about = f"{help[0].upper()}{help[1:]}."
    epilog = f"Example:\n  {example}\n\nMore: {DOCS}/{page} of the repository"
    parser: Parser = commands.add_parser(
        name, help=help, description=about, epilog=epilog, **options
    )
    parser.set_defaults(handler=handler)
    parser.example, parser.page = example, page
    return parser
