"""The parser of every command: one-line errors, and help that is laid out for reading."""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from dpfast.errors import InputError

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

    def _split_lines(self, text: str, width: int) -> list[str]:
        # an option that is named in the text stays whole
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Reports an unusable argument in one line, with the nearest option of the same command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)

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
            if len(sections) > 1:
                choice = " or ".join(f"--{option}" for option in sections)
                raise InputError(f"--{name}: several sections have it; say {choice}")
            same = [option for option in (name, name.rpartition(".")[2]) if option in known]
            near = same or difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean --{near[0]}?" if near else f"{self.prog} --help lists what is known"
            )
            raise InputError(f"{unknown[0]}: no such option of {self.prog}; {hint}")
        return parsed, unknown


def add_command(
    commands: Commands,
    name: str,
    handler: Callable[[argparse.Namespace], int],
    help: str,
    **options: Any,
) -> Parser:
    """Adds a command. help: what it does, a phrase; options: of ``ArgumentParser``."""
    about = f"{help[0].upper()}{help[1:]}."
    parser: Parser = commands.add_parser(name, help=help, description=about, **options)
    parser.set_defaults(handler=handler)
    return parser
