"""What is printed fits its terminal, and a file gets lines in the place of bars."""

import io
import os
import pty
import subprocess
import sys
import termios

import pytest

from dpfast import terminal

ROWS = [("source", "samples", "validation"), ("dp", "4000", "81.20%"), ("static", "4000", "79.90%")]


@pytest.fixture
def screen():
    """A terminal of 60 columns, as a text stream, and what is shown on it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 60)) if sys.version_info >= (3, 11) else os.system(
        f"stty cols 60 rows 24 < {os.ttyname(theirs)}"
    )

    def shown():
        stream.flush()
        text = ""
        while not text.endswith("\n"):  # it comes in parts
            text += os.read(ours, 100_000).decode()
        return text

    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        yield stream, shown
    os.close(ours)


def test_a_terminal_has_a_width_a_file_has_none_and_columns_go_before(screen, monkeypatch):
    stream, _ = screen
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal.width(stream) == 60
    assert terminal.width(io.StringIO()) is None
    monkeypatch.setenv("COLUMNS", "100")
    assert terminal.width(stream) == terminal.width(io.StringIO()) == 100
    for nonsense in ("", "0", "wide", "-3"):
        monkeypatch.setenv("COLUMNS", nonsense)
        assert terminal.width(stream) == 60


def test_columns_that_do_not_fit_stand_below_with_the_first_one_again():
    assert terminal.table(ROWS, columns=16) == (
        "source  samples\ndp         4000\nstatic     4000\n\n"
        "source  validation\ndp          81.20%\nstatic      79.90%"
    )
    whole = terminal.table(ROWS, rule=True)
    assert whole.splitlines()[:2] == ["source  samples  validation", "-" * 27]
    assert terminal.table(ROWS, rule=True, columns=27) == whole


def test_a_table_of_more_than_three_pieces_goes_row_by_row():
    rows = [("case", "median ms", "target"), ("first", "1", ""), ("second", "2", "3x")]
    wide = [[*row, *row[1:], *row[1:]] for row in rows]
    assert terminal.table([row[:2] for row in rows], columns=20) == "case    median ms\n" + (
        "first           1\nsecond          2"
    )
    assert terminal.table(wide, columns=20).splitlines()[:4] == [
        "first",
        "  median ms  1",
        "  median ms  1",
        "  median ms  1",
    ]
    assert terminal.table(wide, columns=20).splitlines()[4:7] == [
        "second",
        "  median ms  2",
        "  target     3x",
    ]


def test_markdown_is_laid_out_on_a_terminal_and_stays_in_a_file():
    text = "of all\n\n| case | dpfast |\n|---|---|\n| a \\| b | 3.00x |\n| c | |\n\nthe end"
    assert terminal.fitted(text, 40) == (
        "of all\n\ncase   dpfast\n-------------\na | b  3.00x\nc\n\nthe end"
    )
    assert terminal.fitted(text, None) == text
    ragged = "| a | b |\n|---|---|\n| one |"
    assert terminal.fitted(ragged, 40) == ragged


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_longer_line_goes_on_further_in(columns):
    line = "  training, 64 at once: 31.41 MiB (pool 3.906 MiB, generator 13.22 MiB, learner)"
    first, *more = terminal.fitted(f"short\n{line}", columns).splitlines()[1:]
    assert max(map(len, [first, *more])) <= columns
    assert all(each.startswith("    ") for each in more)
    assert " ".join([first, *more]).split() == line.split()
    assert terminal.fitted(line, None) == line


def work(total, **options):
    with terminal.Progress(total, "sample", "dp: round 1", **options) as progress:
        for _ in range(10):
            progress.update(5)


def test_a_file_gets_a_line_a_minute_and_no_bar(monkeypatch):
    now = iter(range(0, 10_000, 7))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(60, done=10)
    text = sys.stderr.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    assert text.splitlines()[0].startswith("dp: round 1: 55 of 60 samples in ")
    assert text.count("\n") == 1


def test_the_end_is_a_line_where_it_stays_to_be_read(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(None, leave=True)
    (line,) = sys.stderr.getvalue().splitlines()
    assert line.startswith("dp: round 1: 50 samples in 0 s, ")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    work(50)
    assert sys.stderr.getvalue() == ""


def test_a_bar_stays_within_a_narrow_terminal(screen, monkeypatch):
    stream, shown = screen
    monkeypatch.setattr(sys, "stderr", stream)
    work(50, leave=True)
    text = shown()
    assert "dp: round 1: 100%" in text
    assert max(map(len, text.replace("\n", "\r").split("\r"))) <= 60


def test_a_line_is_in_its_file_at_once(tmp_path):
    code = (
        "import os; from dpfast import terminal; terminal.tell('step 25'); "
        "assert open('log').read() == 'step 25\\n'; os._exit(0)"
    )
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", code]
        subprocess.run(command, stdout=log, cwd=tmp_path, check=True)
