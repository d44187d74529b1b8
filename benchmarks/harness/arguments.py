"""The arguments of a suite: errors as those of every command of dpfast."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks import CHECKOUT, RESULTS
from benchmarks.harness.records import check_appendable
from dpfast.cli.parser import Parser
from dpfast.errors import InputError
from dpfast.files import there


def new_parser(suite: str, about: str | None) -> Parser:
    """The parser of ``dpfast bench SUITE``. about: the suite's docstring, whose first line
    is told.
    """
    return Parser(prog=f"dpfast bench {suite}", description=(about or "").strip().splitlines()[0])


def add_rows(parser: argparse.ArgumentParser) -> None:
    """``--rows``, of which ``is_wanted`` reads the texts between the bars."""
    parser.add_argument(
        "--rows",
        default="",
        metavar="TEXT",
        help="the rows that contain TEXT, or of =TEXT the one of that name; | between several",
    )


def is_wanted(name: str, rows: str) -> bool:
    """Whether ``--rows`` asks for the row of this name."""
    return any(text in name or text == f"={name}" for text in rows.split("|"))


def check_rows(names: Iterable[str], rows: str) -> None:
    """Raises ``InputError`` for a text of ``--rows`` that none of the names has."""
    known = list(names)
    for text in rows.split("|"):
        if not any(is_wanted(name, text) for name in known):
            raise InputError(f"rows = {text!r}: no row has it; there are: {'; '.join(known)}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device`` as a ``torch.device``, as of ``dpfast run``: the GPU that is there by
    default.
    """
    from dpfast.hardware.device import device_named

    parser.add_argument(
        "--device",
        type=device_named,
        default="auto",
        help="cpu, cuda or cuda:N; default: a GPU if there is",
    )


def add_record(parser: argparse.ArgumentParser, suite: str) -> None:
    """``--record``: the folder of the suite's records, where none is named that of a checkout, or
    the current one.
    """
    default = RESULTS if CHECKOUT else Path()
    parser.add_argument(
        "--record",
        type=_record_folder,
        nargs="?",
        const=default,
        metavar="FOLDER",
        help=f"append to {suite}.jsonl in FOLDER (default {_told(default)})",
    )


def add_record_file(parser: argparse.ArgumentParser, default: Path) -> None:
    """``--record``: the file that the suite appends to. default: of ``RESULTS``, where none is
    named; without a checkout of the current folder.
    """
    default = kept(default)
    parser.add_argument(
        "--record",
        type=_record_file,
        nargs="?",
        const=default,
        metavar="FILE",
        help=f"append to FILE (default {_told(default)})",
    )


def kept(file: Path) -> Path:
    """Where what is measured is kept. file: of ``RESULTS``; in a wheel of the current folder."""
    return file if CHECKOUT else Path(file.name)


def _told(place: Path) -> str:
    """A place as a help names it."""
    return str(place.relative_to(RESULTS.parents[1])) if CHECKOUT else str(place)


def _record_file(text: str) -> Path:
    """A file that can be appended to. Raises ``InputError``."""
    check_appendable("record", Path(text))
    return Path(text)


def _record_folder(text: str) -> Path:
    """A folder that is there or can be made. Raises ``InputError``."""
    folder = Path(text)
    if there(folder) and not folder.is_dir():
        raise InputError(f"record = {text!r}: is a file, expected a folder")
    check_appendable("record", folder / "SUITE.jsonl")
    return folder


def add_lines(parser: argparse.ArgumentParser, what: str, *, short: str) -> None:
    """``--results``, ``--short`` and ``--tables`` of a suite that appends a line for each ``what``
    that it has finished, and makes none twice. short: what ``--short`` makes.

    ``lines_file`` says which file that is.
    """
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help=f"file with a line for each {what}, which a finished one appends",
    )
    parser.add_argument("--short", action="store_true", help=f"{short}, for a test")
    parser.add_argument(
        "--tables", action="store_true", help="print what the lines so far say, and make nothing"
    )


def lines_file(results: Path | None, default: Path, *, only_read: bool) -> Path:
    """The file of lines that a suite reads, and appends to unless it is ``only_read``.

    results: what ``--results`` names. default: of ``RESULTS``, where it names none. A wheel keeps
    the lines in the current folder, and reads those that were shipped while that has none.
    """
    if results is not None:
        return results
    return default if only_read and not there(kept(default)) else kept(default)
