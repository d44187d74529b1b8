"""A table's runs, made one after another, each by a process of its own."""

from __future__ import annotations

import ctypes
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dpfast.errors import InputError
from dpfast.files import there
from dpfast.paper.definition import Command
from dpfast.paper.runs import PaperRun
from dpfast.pool.owner import owner_of
from dpfast.textfiles import lines, read_text

LOGS = "logs"  # of a table's folder: what its runs print
SAVING = 120.0  # seconds that a run which was told to stop has to save what it made
PR_SET_PDEATHSIG = 1  # prctl(2)


def make_runs(
    runs: Sequence[PaperRun], launch: Sequence[str], tell: Callable[[str], object]
) -> int:
    """Makes what is not finished, and returns the exit code of the first run that failed, else 0.

    A run that was killed goes on. One that cannot be made, a branch of a run with fewer rounds, is
    passed over. ``launch``: what stands before ``run``. Raises ``InputError`` where another process
    still writes in a run's folder.
    """
    for number, run in enumerate(runs, 1):
        about = f"[{number}/{len(runs)}] {run.name}"
        why = run.out_of_reach()
        if run.finished or why:
            tell(f"{about}: {why or 'finished'}")
            continue
        _wait_for_owner(run.folder, tell)
        more = run.going_on
        begins = {(): "begins", ("--resume",): "goes on"}.get(more, "begins anew")
        tell(f"{about}: {begins}")
        start = time.monotonic()
        log = run.table / LOGS / f"{run.name}.log"
        code = _call([*launch, *run.words, *more, "--quiet"], log)
        if code or not run.finished:
            tell(f"{about}: {_last(log)} ({log})")
            tell("the same command goes on with what is there")
            return code or 1
        tell(f"{about}: {time.monotonic() - start:.0f} s, {_reached(run)}")
    return 0


def make_others(
    commands: Sequence[Command],
    out: Path,
    pipeline: str,
    seed: int,
    launch: Sequence[str],
    tell: Callable[[str], object],
) -> int:
    """Calls the commands whose folders are not there, as ``make_runs`` calls runs. Each writes in a
    hidden folder that gets its name once it is whole.
    """
    for command in commands:
        made = out / command.makes
        if there(made):
            tell(f"{command.name}: finished")
            continue
        tell(f"{command.name}: begins")
        half = made.with_name(f".{made.name}")
        shutil.rmtree(half, ignore_errors=True)  # of a kill
        words = words_of(command, out, pipeline, seed)
        log = out / LOGS / f"{command.name}.log"
        code = _call([*launch, *(str(half) if each == str(made) else each for each in words)], log)
        if code:
            tell(f"{command.name}: {_last(log)} ({log})")
            return code
        half.rename(made)
    return 0


def words_of(command: Command, out: Path, pipeline: str, seed: int) -> list[str]:
    """Returns a command's words after ``dpfast``. pipeline: the generator's folder; seed: of the
    run that it is about.
    """
    values = {"{out}": str(out), "{pipeline}": pipeline, "{seed}": str(seed)}
    parts = re.compile("|".join(map(re.escape, values)))
    return [parts.sub(lambda found: values[found[0]], word) for word in command.words]


def launch_words(text: str) -> list[str]:
    """Returns the words of ``--launch``. Raises ``InputError`` for open quotes, and where it has
    none.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"launch = {text!r}: {error}; expected a command") from None
    if not words:
        raise InputError("launch = '': expected a command, as 'torchrun --nproc-per-node 8'")
    return words


def _call(words: Sequence[str], log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        child = subprocess.Popen(
            words,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child has had it too, and saves
            child.wait()
            raise


def _end_with_parent() -> None:
    """Lets the kernel stop this process as SIGTERM does, so that it saves, when its parent dies of
    whatever.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for_owner(folder: Path, tell: Callable[[str], object]) -> None:
    deadline = time.monotonic() + SAVING
    while (owner := owner_of(folder)) is not None:
        if time.monotonic() > deadline:
            raise InputError(f"out = {str(folder.parent)!r}: {owner} writes in {folder.name!r}")
        tell(f"{folder.name}: {owner} writes there; waiting")
        time.sleep(5)


def _last(log: Path) -> str:
    """Returns the last line that a process said."""
    said = [line for line in lines(read_text(log)) if line.strip()]
    return said[-1] if said else "it said nothing"


def _reached(run: PaperRun) -> str:
    result = run.result or {}
    accuracy = result.get("validation_accuracy")
    told = "" if accuracy is None else f", validation {accuracy:.2%}"
    return f"{result.get('samples', 0):,} samples{told}"
