"""The files that the first rank writes into the folder of a run: its recipe, lines of metrics and
timings, whose numbers the trackers are given too, and the learner's weights.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dpfast.config import OBJECTS_FILE, RECIPE_FILE, Recipe, check_objects
from dpfast.errors import InputError, unsaved
from dpfast.evaluate.measures import Evaluation
from dpfast.files import is_folder, listed
from dpfast.learn.pretrained import KEPT, keep
from dpfast.parallel import ALONE, Ranks
from dpfast.pool.owner import OwnedError, Owner
from dpfast.pool.shards import durable
from dpfast.practice import checkpoint
from dpfast.practice.background import WrittenCheckpoint
from dpfast.practice.callbacks import Addition, Callback, Progress
from dpfast.practice.changes import record_changes, write_recipe
from dpfast.practice.checkpoint import save_weights
from dpfast.practice.result import Result
from dpfast.practice.run_paths import RunPaths, check_vacant
from dpfast.practice.throughput import Throughput
from dpfast.practice.trackers import new_trackers
from dpfast.textfiles import read_whole_json, to_json

log = logging.getLogger(__name__)


class LostLinesWarning(UserWarning):
    """A warning that a run's file of lines is shorter than when the checkpoint was taken."""


class RunWriter(RunPaths):
    """The paths of a run whose files this process writes: the only one, or the first rank.

    recipe: with which the run goes on, where that may not be the one that was asked for.
    """

    writes = True

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
        self._trackers = new_trackers(recipe, path)
        if path.exists() and not resume:
            _remove(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out = {str(path)!r}: cannot be made: {error.strerror}") from error
        self._owner = owned(path)
        self._resumed = resume
        self._changes: dict[str, list[Any]] = {}
        if resume:
            self._changes = record_changes(path, recipe, _steps(path))
        else:
            write_recipe(path, recipe, born=born)
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._timings = (path / "timings.jsonl").open("a", encoding="utf-8")

    def watchers(self, throughput: Throughput) -> Sequence[Callback]:
        for tracker in self._trackers:
            tracker.begin()
        return (MetricsCallback(self, throughput),)

    def state_dict(self) -> dict[str, Any]:
        """Returns the lengths of both files of lines, bytes. Raises ``OSError`` where they lag
        behind.
        """
        return {"metrics": self._metrics.tell(), "timings": self._timings.tell()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, file in (("metrics", self._metrics), ("timings", self._timings)):
            size, held = state.get(name, 0), os.fstat(file.fileno()).st_size
            if size > held:
                warnings.warn(
                    f"{file.name} ends before the checkpoint does, by {size - held} bytes: the "
                    "report of this run lacks those lines",
                    LostLinesWarning,
                    stacklevel=2,
                )
                size = held
            file.truncate(size)
            file.seek(size)

    def keep_objects(self, objects: Mapping[str, str]) -> None:
        """Writes ``objects.json``. Raises ``InputError`` where a run that goes on has others."""
        if self._resumed:
            check_objects(self.path, objects)
        elif objects:
            with durable(self.path, OBJECTS_FILE) as file:
                file.write(json.dumps(objects, indent=2).encode() + b"\n")

    def keep_learner(self, new_learner: Callable[[], nn.Module]) -> None:
        if self.recipe.learner.pretrained and not is_folder(self.path / KEPT):
            with unsaved(f"{KEPT} was not written", "a run that goes on needs that folder again"):
                keep(new_learner(), self.path)

    def sync(self) -> None:
        for file in (self._metrics, self._timings):
            os.fsync(file.fileno())

    def log_changes(self) -> None:
        """Logs, once, which fields of the recipe a resumed run has changed; the run's log is in its
        folder, and so begins after the folder is opened.
        """
        for name, (was, value) in self._changes.items():
            log.info("from here on %s = %r, it was %r", name, value, was)
        self._changes = {}

    def log(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``metrics.jsonl`` and gives its numbers to the trackers, as
        "source/event/name".
        """
        self._write(self._metrics, event, source, step, values)

    def time(self, event: str, source: str, step: int, **values: Any) -> None:
        """Writes one line of ``timings.jsonl``."""
        self._write(self._timings, event, source, step, values)

    def _write(self, file: Any, event: str, source: str, step: int, values: dict[str, Any]) -> None:
        # the line stays in its buffer until there is room
        with unsaved(f"{Path(file.name).name} lags behind"):
            file.write(to_json({"event": event, "source": source, "step": step, **values}) + "\n")
            file.flush()
        numbers = {
            f"{source}/{event}/{k}": float(v)
            for k, v in values.items()
            if isinstance(v, (int, float))
        }
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files, and lets another process write the folder."""
        for file in (self._metrics, self._timings):
            with unsaved(f"{Path(file.name).name} is not complete", "its last lines are lost"):
                file.close()
        for tracker in self._trackers:
            tracker.close()
        self._owner.close()


class MetricsCallback(Callback):
    """Writes what a loop tells into the files of its run, and at its end the learner's weights."""

    def __init__(self, folder: RunWriter, throughput: Throughput) -> None:
        self.folder, self.throughput = folder, throughput

    def on_start(self, progress: Progress) -> None:
        self.folder.log_changes()
        self.throughput.begin(progress)

    def on_round(self, progress: Progress, addition: Addition) -> None:
        cost = addition.cost
        self.folder.time(
            "generation",
            progress.source,
            progress.step,
            round=addition.number,
            made=cost.samples,
            samples=addition.added,
            seconds=cost.seconds,
            samples_per_second=addition.added / cost.seconds if cost.seconds else None,
            forwards=cost.forwards,
            flops=cost.flops,
            **self.throughput.generation(cost),
        )
        if addition.number:
            self.folder.log(
                "addition",
                progress.source,
                progress.step,
                round=addition.number,
                samples=addition.total,
                omega=addition.omega,
                entropy=addition.entropy,
                unguided_entropy=addition.unguided_entropy,
                pruning_ratio=addition.pruning_ratio,
            )

    def on_evaluation(self, progress: Progress, evaluation: Evaluation, loss: float) -> None:
        rates = self.throughput.interval(progress)
        self.folder.time("interval", progress.source, progress.step, **rates)
        self.folder.log(
            "evaluation",
            progress.source,
            progress.step,
            accuracy=evaluation.top1,
            loss=loss,
            validation_loss=evaluation.loss,
            entropy=evaluation.entropy,
            samples=progress.pool_size,
            lr=progress.lr,
            grad_norm=progress.grad_norm,
            waited=progress.waited,
            patience=progress.patience,
            **{name: value for name, (value, _) in evaluation.shots.items()},
        )

    def on_checkpoint(self, progress: Progress, written: WrittenCheckpoint) -> None:
        self.folder.time(
            "checkpoint",
            progress.source,
            written.step,
            waited=written.waited,
            seconds=written.seconds,
            bytes=written.bytes,
        )

    def on_result(self, progress: Progress, result: Result) -> None:
        seconds = result.training_seconds
        self.folder.time(
            "training",
            progress.source,
            progress.step,
            seconds=seconds,
            evaluation_seconds=result.evaluation_seconds,
            steps_per_second=result.iterations / max(seconds, 1e-9),
            loader_wait=result.loader_wait,
        )
        self.folder.log(
            "result",
            progress.source,
            progress.step,
            samples=progress.pool_size,
            additions=result.additions,
            validation_accuracy=result.validation.top1,
            test_accuracy=result.test.top1,
            test_per_class=[round(float(v), 6) for v in result.test.per_class],
            **{f"test_{name}": value for name, (value, _) in result.test.shots.items()},
            **{f"{name}_classes": count for name, (_, count) in result.test.shots.items()},
        )
        for row in result.sets:
            self.folder.log("set", progress.source, progress.step, **row.to_dict())
        name = f"learner_{progress.source}.safetensors"
        with unsaved(f"{name} was not written"):
            save_weights(result.learner.state_dict(), self.folder.path / name)


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
    """Returns the optimiser steps of the newest checkpoint of every source that has one."""
    found = {}
    for folder in listed(path, "checkpoints_*"):
        with contextlib.suppress(KeyError, IndexError, TypeError):
            newest = checkpoint.paths(folder)[-1]
            found[folder.name.removeprefix("checkpoints_")] = read_whole_json(newest)["step"]
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
