"""Text for people: as wide as their terminal, and lines in the place of bars where there is none.

A width of None stands for a file or a pipe: nothing is folded there.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

EVERY = 60.0  # seconds between two lines on a piece of work, where no bar can be
NARROWEST = 20  # columns
PIECES = 3  # of a table below each other; one of more is read more easily row by row
MARKDOWN = re.compile(r"^\|.*\n\|[-:| ]+\|(?:\n\|.*)*", re.MULTILINE)  # a table
BAR = re.compile(r"(?<!\\)\|")  # between two cells


def width(stream: TextIO | None = None) -> int | None:
    """Returns the columns of the terminal behind a stream, by default stdout; ``COLUMNS`` of the
    environment goes before it, as in other programs. None for a file or a pipe.
    """
    stream = sys.stdout if stream is None else stream
    said = os.environ.get("COLUMNS", "")
    if said.isascii() and said.isdecimal() and int(said):
        return max(int(said), NARROWEST)
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):  # a file, a closed stream, one in memory, none
        return None
    return max(columns, NARROWEST) if columns else None


def fitted(text: str, columns: int | None) -> str:
    """Returns a text whose tables of Markdown are laid out as by ``table``, and whose longer lines
    go on in the next one, two columns further in.
    """
    if columns is None:
        return text
    made = []
    for line in MARKDOWN.sub(lambda found: _laid_out(found[0], columns), text).split("\n"):
        inner = " " * (len(line) - len(line.lstrip()) + 2)
        folded = textwrap.wrap(
            line, columns, subsequent_indent=inner, break_long_words=False, break_on_hyphens=False
        )
        made += [line] if len(line) <= columns else folded
    return "\n".join(made)


def _row_by_row(rows: Sequence[Sequence[str]]) -> str:
    """Returns each row as its first cell and, below it, the others that are not empty, with their
    heads.
    """
    heads, *body = rows
    wide = max(map(len, heads))
    made = []
    for first, *others in body:
        cells = zip(heads[1:], others, strict=True)
        made.append(first or heads[0])
        made += [f"  {head.ljust(wide)}  {cell}" for head, cell in cells if cell.strip()]
    return "\n".join(made)


def _laid_out(markdown: str, columns: int) -> str:
    rows = [BAR.split(line)[1:-1] for line in markdown.split("\n")]
    rows = [[cell.strip().replace("\\|", "|") for cell in row] for row in (rows[0], *rows[2:])]
    if any(len(row) != len(rows[0]) for row in rows):
        return markdown
    return table(rows, left=range(len(rows[0])), rule=True, columns=columns)


def say(text: str) -> None:
    """Prints a text on stdout, fitted to its terminal."""
    print(fitted(text, width()), flush=True)


def table(
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    rule: bool = False,
    columns: int | None = None,
) -> str:
    """Returns rows of cells in columns. Those that do not fit beside the first one stand below,
    with the first one again; where that made more than ``PIECES`` tables, row stands below row.

    rows: of equal length, the heads first; left: the columns whose cells stand on the left;
    rule: whether a line follows the heads; columns: of the terminal, None: all in one piece.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pieces: list[list[int]] = []
    room = 0
    for index in range(1, len(widths)):
        needs = widths[index] + 2
        if not pieces or (columns is not None and needs > room):
            pieces.append([0])
            room = sys.maxsize if columns is None else columns - widths[0]
        pieces[-1].append(index)
        room -= needs
    if len(pieces) > PIECES:
        return _row_by_row(rows)
    made = []
    for piece in pieces or [[0]]:
        lines = []
        for row in rows:
            cells = (
                row[i].ljust(widths[i]) if i in left else row[i].rjust(widths[i]) for i in piece
            )
            lines.append("  ".join(cells).rstrip())
        if rule:
            lines.insert(1, "-" * max(map(len, lines)))
        made.append("\n".join(lines))
    return "\n\n".join(made)


class Progress:
    """The progress of one piece of work, on stderr: a bar on a terminal; elsewhere, as in a file of
    logs, a line a minute.

    total: None where it is not known; done: what of it is there already; leave: whether its end
    stays to be read.
    """

    def __init__(
        self, total: int | None, unit: str, label: str, *, done: int = 0, leave: bool = False
    ) -> None:
        self.unit = unit
        self._total, self._label, self._leave = total, label, leave
        self._start, self._done, self._told = done, done, done
        self._began = self._last = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                unit=f" {unit}",
                desc=label or None,
                initial=done,
                leave=leave,
                dynamic_ncols=True,
            )

    def update(self, count: int = 1) -> None:
        """Adds what has been done since the last call."""
        if self._bar is not None:
            self._bar.update(count)
            return
        self._done += count
        if time.monotonic() - self._last >= EVERY:
            self._tell()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._leave and self._done > self._told:
            self._tell()

    def _tell(self) -> None:
        self._last, self._told = time.monotonic(), self._done
        seconds = self._last - self._began
        of = "" if self._total is None else f" of {self._total}"
        rate = (self._done - self._start) / max(seconds, 1e-9)
        label = f"{self._label}: " if self._label else ""
        line = f"{label}{self._done}{of} {self.unit}s in {seconds:.0f} s, {rate:.3g} a second"
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tell(line: str) -> None:
    """Prints a line on stdout, above the bar of a terminal, and at once in a file."""
    tqdm.write(fitted(line, width()))
    if sys.stdout is not None:
        sys.stdout.flush()
