"""The folder of a run: the recipe as run, metrics as JSON lines and TensorBoard events,
pictures.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpfast import launch
from dpfast.config import RECIPE_FILE, Recipe
from dpfast.errors import InputError, RecipeError, SaveWarning, unsaved
from dpfast.evaluate.measures import Evaluation
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.owner import OwnedError, Owner, owner_of
from dpfast.pool.rank_folders import rank_folder_name
from dpfast.pool.shards import durable
from dpfast.practice import checkpoint
from dpfast.practice.callbacks import Addition, Callback
from dpfast.practice.changes import BORN, CHANGES, continued, record_changes, write_recipe
from dpfast.practice.checkpoint import save_weights
from dpfast.practice.contents import CONTENTS
from dpfast.practice.events import Events
from dpfast.practice.throughput import Throughput

if TYPE_CHECKING:
    from dpfast.practice.loop import Loop
    from dpfast.practice.result import Result


log = logging.getLogger(__name__)
SHARED = ".shared"  # what the first rank writes for the others to see
PARTS = (  # what a run's folder has before the first sample
    RECIPE_FILE,
    CHANGES,
    "metrics.jsonl",
    "timings.jsonl",
    "events.*",
    "logs",
    "checkpoints_*",
    "pool_*",
    SHARED,
    ".launch",
)
SEEN = 30.0  # seconds in which a network's file system shows it to them


class RunPaths:
    """Where the parts of a run's folder are; every rank has its own for samples and progress."""

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = path, ranks

    def checkpoints(self, source: str) -> Path:
        """Where the checkpoints of a source's loop are kept."""
        return self.path / f"checkpoints_{source}"

    def pool(self, source: str) -> Path:
        """Where a source's samples are saved: one saved pool, or a folder of one for each rank."""
        return self.path / f"pool_{source}"

    def _progress(self, source: str) -> str:
        part = "" if self.ranks.alone else f"-{rank_folder_name(self.ranks)}"
        return f"progress_{source}{part}.json"

    def progress(self, source: str) -> dict[str, Any] | None:
        """What ``save_progress`` kept; None where there is nothing, or nothing that can be read."""
        try:
            return json.loads((self.path / self._progress(source)).read_text())
        except (OSError, ValueError):
            return None

    def save_progress(self, source: str, progress: dict[str, Any]) -> None:
        name = self._progress(source)
        with unsaved(f"{name} was not written"), durable(self.path, name) as file:
            file.write(json.dumps(progress).encode())


class RunWriter(RunPaths, Callback):
    """``runs/<name>/``. As a callback it writes down what a loop tells. Of several ranks the first
    one has it.

    recipe: with which the run goes on, where that may not be the one that was asked for.

    recipe.json     the recipe in force, with every default filled in; born.json the first one, and
                    changes.jsonl what
                    changed in between (``dpfast.practice.changes``)
    contents.json   what the folders of the generator and the real images held
                    (``dpfast.practice.contents``)
    metrics.jsonl   one line per evaluation, addition and result; a function of the recipe alone, so
                    without times
    timings.jsonl   what was done how fast: a line per round, per interval between evaluations and
                    per training
    events.*        the numbers of both for TensorBoard
    logs/           the log of every rank (``dpfast.logs``)
    learner_*       the evaluated weights of every source's classifier, safetensors
    checkpoints_*/  the states of every source's loop (``dpfast.practice.checkpoint``)
    pool_*/         every source's samples, webdataset shards with a manifest
                    (``dpfast.pool.shards``), or a sub-folder
                    of them for each rank
    progress_*      what is saved of a round that is being made
    branch.json     where a branch began: run, round and iteration
    .launch         which call of torchrun made it
    index.html      the report of a finished run, with its plots and contact sheets as *.png
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        *,
        overwrite: bool = False,
        resume: bool = False,
        ranks: Ranks = ALONE,
        born: str | None = None,
    ) -> None:
        super().__init__(path, ranks)
        self.recipe = recipe = check_vacant(path, recipe, overwrite=overwrite, resume=resume)
        if path.exists() and not resume:
            _remove(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out = {str(path)!r}: cannot be made: {error.strerror}") from error
        self._owner = owned(path)
        self._changes: dict[str, list[Any]] = {}
        if resume:
            self._changes = record_changes(path, recipe, _steps(path))
        else:
            write_recipe(path, recipe, born=born)
        self._metrics = (path / "metrics.jsonl").open("a")
        self._timings = (path / "timings.jsonl").open("a")
        self._events: Events | None = Events(path)

    def written(self) -> list[int]:
        """The lengths of ``metrics.jsonl`` and ``timings.jsonl``, bytes. Raises ``OSError`` where
        they lag behind.
        """
        return [self._metrics.tell(), self._timings.tell()]

    def sync(self) -> None:
        """Makes the lines last that a checkpoint is to speak of; from any thread."""
        for file in (self._metrics, self._timings):
            os.fsync(file.fileno())

    def rewind(self, written: list[int]) -> None:
        """Drops the lines that came after ``written``."""
        for file, size in zip((self._metrics, self._timings), written, strict=True):
            file.truncate(size)
            file.seek(size)

    def on_start(self, loop: Loop) -> None:
        for name, (
            was,
            value,
        ) in self._changes.items():  # the run's log is in this folder, and so begins after it
            log.info("from here on %s = %r, it was %r", name, value, was)
        self._changes = {}
        self._pace = Throughput(loop)

    def on_round(self, loop: Loop, addition: Addition) -> None:
        cost, step = addition.cost, loop.trainer.step_count
        rate = addition.added / max(cost.seconds, 1e-9)
        self.time(
            "generation",
            loop.name,
            step,
            round=addition.number,
            made=cost.samples,
            samples=addition.added,
            seconds=cost.seconds,
            samples_per_second=rate,
            forwards=cost.forwards,
            flops=cost.flops,
            **self._pace.generation(cost),
        )
        if addition.number:
            self.log(
                "addition",
                loop.name,
                step,
                round=addition.number,
                samples=addition.total,
                entropy=addition.entropy,
                unguided_entropy=addition.unguided_entropy,
                pruning_ratio=addition.pruning_ratio,
            )

    def on_evaluation(self, loop: Loop, evaluation: Evaluation, loss: float) -> None:
        self.time("interval", loop.name, loop.trainer.step_count, **self._pace.interval())
        self.log(
            "evaluation",
            loop.name,
            loop.trainer.step_count,
            accuracy=evaluation.top1,
            loss=loss,
            validation_loss=evaluation.loss,
            entropy=evaluation.entropy,
            samples=len(loop.pool),
        )

    def on_result(self, loop: Loop, result: Result) -> None:
        step, seconds = loop.trainer.step_count, result.training_seconds
        self.time(
            "training",
            loop.name,
            step,
            seconds=seconds,
            evaluation_seconds=result.evaluation_seconds,
            steps_per_second=result.iterations / max(seconds, 1e-9),
            loader_wait=result.loader_wait,
        )
        self.log(
            "result",
            loop.name,
            step,
            samples=len(loop.pool),
            additions=result.additions,
            validation_accuracy=result.validation.top1,
            test_accuracy=result.test.top1,
            test_per_class=[round(float(v), 6) for v in result.test.per_class],
        )
        for row in result.sets:
            self.log("set", loop.name, step, **row.to_dict())
        name = f"learner_{loop.name}.safetensors"
        with unsaved(f"{name} was not written"):
            save_weights(result.learner.state_dict(), self.path / name)

    def log(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``metrics.jsonl`` and its numbers as TensorBoard scalars
        "source/event/name".
        """
        self._write(self._metrics, event, source, step, values)

    def time(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``timings.jsonl``."""
        self._write(self._timings, event, source, step, values)

    def _write(self, file: Any, event: str, source: str, step: int, values: dict[str, Any]) -> None:
        with unsaved(
            f"{Path(file.name).name} lags behind"
        ):  # the line stays in its buffer until there is room
            file.write(
                json.dumps({"event": event, "source": source, "step": step, **values}) + "\n"
            )
            file.flush()
        if self._events is None:
            return
        numbers = {
            f"{source}/{event}/{k}": float(v)
            for k, v in values.items()
            if isinstance(v, (int, float))
        }
        events, self._events = self._events, None  # given up, unless the disk takes it
        with unsaved(
            "TensorBoard's events end here", "metrics.jsonl and timings.jsonl have the numbers"
        ):
            events.scalars(step, numbers)
            self._events = events

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for file in (self._metrics, self._timings):
            with unsaved(f"{Path(file.name).name} is not complete", "its last lines are lost"):
                file.close()
        if self._events is not None:
            self._events.close()
        self._owner.close()


def check_vacant(
    path: Path, recipe: Recipe, *, overwrite: bool = False, resume: bool = False
) -> Recipe:
    """The recipe with which the run in ``path`` begins, or goes on.

    Raises ``InputError`` when ``path`` may not become, or continue, the folder of a run of
    ``recipe``: only a run is ever replaced, none in which a process still writes, and unasked only
    one that is ``unbegun``. What a run may change is in ``dpfast.practice.changes``.
    """
    if resume:
        if not (path / RECIPE_FILE).is_file():
            raise InputError(f"resume: {str(path)!r} holds no run")
        if recipe.pool.save_samples == "none":
            raise InputError(
                f"resume: {str(path)!r} has kept no samples (save_samples = 'none'); run it anew"
            )
        return continued(path, recipe)
    if not path.exists() or (path.is_dir() and all(_early(p.name) for p in path.iterdir())):
        return recipe  # a run that was killed before it began
    if not (path / RECIPE_FILE).is_file():
        raise InputError(f"out = {str(path)!r}: exists and holds no run; choose another folder")
    if not overwrite and not unbegun(path):
        raise InputError(
            f"out = {str(path)!r}: holds another run; --resume continues it, --overwrite replaces "
            "it"
        )
    living = owner_of(path)
    if living is not None:
        raise InputError(f"out = {str(path)!r}: {living} writes there")
    return recipe


def unbegun(path: Path) -> bool:
    """Whether a folder holds a run without any sample, as one that the disk refuses at its start,
    and nothing else.
    """
    metrics = path / "metrics.jsonl"
    return (
        metrics.is_file()
        and not metrics.stat().st_size
        and not any(path.glob("pool_*/**/*.tar"))
        and all(
            _early(p.name) or any(fnmatch(p.name, part) for part in PARTS) for p in path.iterdir()
        )
    )


def check_saving(recipe: Recipe, *, resume: bool, branch: bool) -> None:
    """Raises ``InputError`` where a run without saved samples would be asked to go on; warns of
    one that begins.
    """
    if recipe.pool.save_samples != "none":
        return
    again = launch.max_restarts()
    for asked, what in (
        (resume, "--resume"),
        (branch, "--branch-at"),
        (again, f"--max-restarts {again} of torchrun"),
    ):
        if asked:
            raise RecipeError(
                f"save_samples = 'none': nothing is kept that {what} could go on from; expected "
                "'png'"
            )
    if not launch.rank():
        warnings.warn(
            "save_samples = 'none': no samples and no checkpoints are kept, so this run cannot be "
            "resumed, branched or "
            "exported, and the report has no errors by round",
            SaveWarning,
            stacklevel=2,
        )


def check_shared(out: Path, ranks: Ranks) -> None:
    """Raises ``InputError``, naming a rank and its host, unless all ranks see what the first one
    writes in ``out``.
    """
    if ranks.alone:
        return
    token = ranks.broadcast_object(f"{time.time_ns()} {os.getpid()}" if ranks.first else None)
    with ranks.all_or_none():
        if ranks.first:
            with durable(out, SHARED) as file:
                file.write(token.encode())
    with ranks.all_or_none():
        deadline = time.monotonic() + SEEN
        while not (out / SHARED).is_file() or (out / SHARED).read_text() != token:
            if time.monotonic() > deadline:
                raise InputError(
                    f"out = {str(out)!r}: on {socket.gethostname()} it is not the folder in which "
                    "rank 0 writes; "
                    "expected one that all nodes share"
                )
            ranks.beat()
            time.sleep(0.1)


def _early(name: str) -> bool:
    """Whether a file may be there before a run's recipe is."""
    return name.startswith(".owner-") or name in (
        BORN,
        CONTENTS,
        *(f".{each}.tmp" for each in (BORN, CONTENTS, RECIPE_FILE)),
    )


def owned(path: Path) -> Owner:
    """Makes this process the one that writes a run's folder. Raises ``InputError`` where another
    does, or none can.
    """
    try:
        return Owner(path)
    except OwnedError as error:
        raise InputError(f"out = {str(path)!r}: {error}") from error
    except OSError as error:
        raise InputError(f"out = {str(path)!r}: cannot be written: {error.strerror}") from error


def _steps(path: Path) -> dict[str, int]:
    """The optimiser steps of the newest checkpoint of every source that has one."""
    found = {}
    for folder in sorted(path.glob("checkpoints_*")):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            newest = checkpoint.paths(folder)[-1]
            found[folder.name.removeprefix("checkpoints_")] = json.loads(newest.read_text())["step"]
    return found


def _remove(path: Path) -> None:
    """Removes a run. Its recipe goes last: killed on the way, the rest is still a run that may be
    replaced.
    """
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != RECIPE_FILE:
            entry.unlink()
    shutil.rmtree(path)
