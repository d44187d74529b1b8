"""Trackers of a run's numbers beside its own files: TensorBoard, and what tracks experiments,
through the trackers of accelerate.

A run with a folder has trackers, on its first rank alone. One that is no file works in a thread of
its own, so that no network holds up the training, and one that fails is off from there on: that is
one warning, and the run goes on.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpfast.config import Recipe, flat, imported, is_import_path, made
from dpfast.errors import InputError, first_line, unsaved
from dpfast.extras import require
from dpfast.pool.shards import durable
from dpfast.practice.tensorboard_file import TensorBoardFile
from dpfast.textfiles import read_whole_json

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKING = "tracking.json"  # in a run's folder: what trackers know it by
PROJECT = "dpfast"  # the project, or experiment, of all runs
LAST = 30.0  # seconds in which a tracker may send, at the end of a run, what it has not sent yet


class TrackerWarning(UserWarning):
    """A warning that a tracker has stopped; the run goes on."""


class Tracker(Protocol):
    """Takes the numbers of a run; it neither raises an error nor waits for a network."""

    def begin(self) -> None:
        """Hears that the run begins, or goes on; its folder is there."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Takes numbers by their names, "source/event/name", after ``step`` optimiser steps of the
        source's learner.
        """
        ...

    def close(self) -> None:
        """Ends, with all numbers where they belong."""
        ...


@dataclass(frozen=True)
class Tracked:
    """The facts that a tracker is told of a run. config: its recipe, with lists and tables as
    text.
    """

    name: str
    folder: Path
    config: dict[str, Any]

    def id(self) -> str:
        """Returns the name of the run in all its lives: 32 hexadecimal digits, kept in its
        folder.
        """
        kept = read_whole_json(self.folder / TRACKING)
        if isinstance(kept, dict) and isinstance(kept.get("id"), str):
            return kept["id"]
        new = uuid.uuid4().hex
        with unsaved(f"{TRACKING} was not written"), durable(self.folder, TRACKING) as file:
            file.write(json.dumps({"id": new}).encode() + b"\n")
        return new


class TrackerThread:
    """A tracker of accelerate's in a thread of its own.

    start: gives the tracker, which has begun, for a run and its id; called in the thread.
    """

    def __init__(
        self, name: str, run: Tracked, start: Callable[[Tracked, str], GeneralTracker]
    ) -> None:
        self.name, self.run, self.start = name, run, start
        self._sent: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._off = False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        _speak_alone()
        self._thread = threading.Thread(
            target=self._track, args=(self.run.id(),), name=self.name, daemon=True
        )
        self._thread.start()

    def _track(self, id: str) -> None:
        try:
            tracker = self.start(self.run, id)
            while (sent := self._sent.get()) is not None:
                step, values = sent
                tracker.log(values, step=step)
            tracker.finish()
        except BaseException as error:  # whatever a network, and a package of others, raises
            self._failure = error

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hands numbers to the thread, or drops them where it has failed."""
        if not self._given_up():
            self._sent.put((step, values))

    def close(self) -> None:
        """Waits until the thread has ended, for ``LAST`` seconds at most."""
        if self._thread is None or self._given_up():
            return
        self._sent.put(None)
        self._thread.join(LAST)
        if not self._given_up() and self._thread.is_alive():
            self._warn(f"it has not taken all numbers within {LAST:g} s")

    def _given_up(self) -> bool:
        """Returns True if the tracker is off; the first time after a failure with a warning."""
        if self._failure is not None and not self._off:
            self._off = True
            self._warn(first_line(self._failure))
        return self._off

    def _warn(self, why: str) -> None:
        warnings.warn(
            f"the tracker {self.name} is off: {why}; the run goes on, and its metrics.jsonl and "
            "timings.jsonl have all numbers",
            TrackerWarning,
            stacklevel=4,
        )


def _speak_alone() -> None:
    """Tells accelerate, whose trackers and logs ask which process this is, that it is alone, as the
    first rank is among trackers. By torchrun's variable it would choose a GPU, and make a process
    group where there is none.
    """
    from accelerate import PartialState

    local = os.environ.pop("LOCAL_RANK", None)
    try:
        PartialState()
    finally:
        if local is not None:
            os.environ["LOCAL_RANK"] = local


def new_trackers(recipe: Recipe, folder: Path) -> list[Tracker]:
    """Returns the recipe's trackers, not begun, for the run that will be in a folder.

    Raises ``InputError`` where a package is missing, and where an import path leads to nothing that
    gives an ``accelerate.tracking.GeneralTracker``.
    """
    require(*recipe.tracker_packages)
    config = {
        name: value if value is None or isinstance(value, (str, int, float)) else json.dumps(value)
        for name, value in flat(recipe.to_dict()).items()
    }
    run = Tracked(folder.resolve().name, folder, config)
    found: list[Tracker] = []
    for name in recipe.trackers:
        if name == "tensorboard":
            found.append(TensorBoardFile(folder))
        else:
            start = STARTS.get(name) or partial(_started, _own(name, run))
            found.append(TrackerThread(name, run, start))
    return found


def check_paths(recipe: Recipe) -> None:
    """Raises ``InputError`` where a tracker's import path leads to nothing that can be called."""
    for path in filter(is_import_path, recipe.trackers):
        found = imported("trackers", path)
        if not callable(found):
            raise InputError(
                f"trackers = {path!r}: is a {type(found).__name__}, expected a kind of "
                "accelerate.tracking.GeneralTracker, or a function that gives one"
            )


def _own(path: str, run: Tracked) -> GeneralTracker:
    """Returns the user's own tracker, called as accelerate calls its: with the project, and with a
    folder where it asks for one.
    """
    from accelerate.tracking import GeneralTracker

    asks = getattr(imported("trackers", path), "requires_logging_directory", False)
    return made("trackers", path, GeneralTracker, PROJECT, *([str(run.folder)] if asks else []))


def _started(tracker: GeneralTracker, run: Tracked, id: str) -> GeneralTracker:
    tracker.start()
    tracker.store_init_configuration(run.config)
    return tracker


def _wandb(run: Tracked, id: str) -> GeneralTracker:
    from accelerate.tracking import WandBTracker

    class WandB(WandBTracker):
        """A tracker of Weights & Biases that logs steps beside the numbers. It drops what has a
        smaller step than the numbers before, as those of a second source have.
        """

        def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
            super().log({**values, "step": step}, **options)

    tracker = WandB(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=id,
        name=run.name,
        dir=os.environ.get("WANDB_DIR", str(run.folder)),
        resume="allow",
    )
    _started(tracker, run, id)
    tracker.tracker.define_metric("*", step_metric="step")
    return tracker


def _mlflow(run: Tracked, id: str) -> GeneralTracker:
    import mlflow
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(PROJECT, run_name=run.name, tags={"dpfast_run": id})
    known = mlflow.search_runs(
        experiment_names=[tracker.experiment_name],
        filter_string=f"tags.dpfast_run = '{id}'",
        output_format="list",
    )
    if not known:
        return _started(tracker, run, id)
    tracker.run_id = known[0].info.run_id  # whose parameters are as they were born
    tracker.start()
    return tracker


def _trackio(run: Tracked, id: str) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    # which knows a run by its name
    tracker = TrackioTracker(PROJECT, name=f"{run.name}-{id[:8]}", resume="allow")
    return _started(tracker, run, id)


STARTS: dict[str, Callable[[Tracked, str], GeneralTracker]] = {
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
