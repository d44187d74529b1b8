"""Checkpoints of a running loop: what is saved when, beside the training."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dpfast.config import Practice
from dpfast.errors import SaveWarning
from dpfast.parallel import Ranks
from dpfast.pool.saver import SHARD_BYTES
from dpfast.practice import checkpoint
from dpfast.practice.background import (
    BackgroundWriter,
    CheckpointTimer,
    HostCopy,
    WrittenCheckpoint,
)
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.loop_state import Component
from dpfast.practice.run_paths import RunPaths
from dpfast.practice.saved_samples import SavedSamples

# seconds that a run waits for samples of other ranks whose checkpoint is kept for good, or is the
# last
GRACE = 20.0


@dataclass(frozen=True)
class Moment:
    """The moment of a checkpoint: ``step`` of ``iterations``, the label where it is kept for good
    (``dpfast.practice.checkpoint``), and whether a round is pending.
    """

    step: int
    iterations: int
    label: str | None
    pending: bool = False


class LoopCheckpointer:
    """Saves the components of a loop in the folder of its run; without a folder it does nothing.

    A checkpoint is written at the start, before and after every round and at the end, and by time
    at evaluations, or between two where they are further apart than ``checkpoint_minutes``
    (``CheckpointTimer``). While a round is pending, the newest checkpoint is of the moment before
    it, and ``SavedSamples`` notes the samples that it has so far.

    Every rank saves its samples. The first one copies its state and writes it in the background, as
    soon as the manifests of all ranks hold what the checkpoint promises.

    The clock of the first rank decides. At an evaluation it does so alone, as the others have
    nothing to give; between two, its wish travels with the message in which ranks ask each other to
    stop.

    components: the parts of the loop by name, as they are then. size: bytes of one checkpoint.
    told: called in the loop's thread for each checkpoint that was written.
    """

    def __init__(
        self,
        folder: RunPaths | None,
        samples: SavedSamples,
        components: Callable[[], Mapping[str, Component]],
        practice: Practice,
        *,
        size: int,
        told: Callable[[WrittenCheckpoint], None],
    ) -> None:
        self.folder = folder
        self.samples = samples
        self.components = components
        self.ranks: Ranks = samples.ranks
        self.kept = practice.checkpoints_kept
        self.size, self.told = size, told
        self.clock = samples.clock  # all times of saving are its own
        self.timer = CheckpointTimer(
            practice.checkpoint_share, practice.checkpoint_minutes, self.clock
        )
        self.writer = BackgroundWriter()
        self._copy = HostCopy()
        self._moved = True  # whether there may be samples that another number of ranks has saved
        self._pending_label: str | None = None  # of the checkpoint that was begun last
        self._newest: float | None = None  # when the newest checkpoint was taken

    @property
    def _writes(self) -> bool:
        """True if this process writes the checkpoints."""
        return self.folder is not None and self.folder.writes and self.samples.saves

    @property
    def _grace(self) -> float:
        """The seconds that a checkpoint that must not be lost may wait for its samples: not at all
        where saving has stopped.
        """
        return GRACE if self.samples.saves and not self.samples.refused else 0.0

    @contextlib.contextmanager
    def opened(self, classes: tuple[str, ...]) -> Iterator[None]:
        """Saves samples and checkpoints in the background within a ``with`` block. classes: names
        of the labels.
        """
        if self.folder is None or self.samples.state.finished or self.samples.kept_as == "none":
            yield
            return
        reserve = 2 * self.size + (self.ranks.size - 1) * SHARD_BYTES
        with self.samples.saving(classes, reserve=reserve):
            try:
                yield
            finally:
                self.writer.clear(self._grace)
                self._report()

    def newest(self) -> str | None:
        """Returns the path of the newest checkpoint, if there is one."""
        self.writer.clear()
        if self.folder is None:
            return None
        saved = checkpoint.paths(self.folder.checkpoints(self.samples.source))
        return str(saved[-1]) if saved else None

    def overdue(self) -> bool:
        """Returns True if this rank asks for a checkpoint between two evaluations."""
        return self._writes and self.timer.overdue() and not self.writer.writing

    def evaluated(self, moment: Moment) -> None:
        """Saves after an evaluation, if it is time, or the moment's checkpoint is kept for good."""
        self.samples.retry()
        self._report()
        if not self._writes:
            return
        free = not self.timer.limit or not self.writer.writing
        if moment.label is not None or (free and self.timer.due()):
            self._begin(moment)

    def save(self, moment: Moment, *, wait: bool = False) -> None:
        """Saves this moment, which all ranks ask for; ``wait``: it is on the disk when this
        returns.

        A checkpoint that the disk refuses is a warning: training goes on.
        """
        samples = self.samples
        if not samples.saves:
            return
        if wait and self.ranks.any(not samples.wait()):
            self._warn(
                f"{samples.saved} of the {samples.held()} samples of {self.ranks} are on the disk"
            )
            return
        samples.retry()
        self._begin(moment)
        if wait:
            self.writer.wait()
        self._report()

    def _begin(self, moment: Moment) -> None:
        """Copies the state, and writes it in the background where this process writes."""
        started = self.clock()
        if self._writes:
            kept = self._pending_label is not None
            if self.writer.clear(self._grace if kept else 0.0) and (kept or self.timer.overdue()):
                self._warn("not all samples that it promises are on the disk")
        try:
            states = {name: part.state_dict() for name, part in self.components().items()}
        except OSError as error:  # of lines that it would promise
            self._warn(str(error))
            return
        if not self._writes:
            return
        taken = Checkpoint(moment.step, moment.iterations, self.ranks.size, states)
        taken = taken.with_tensors(self._copy.take(taken.tensors))
        self._pending_label = moment.label
        held = [self.samples.held(rank) for rank in range(self.ranks.size)]
        waited = self.clock() - started
        self.timer.begun()
        self.writer.begin(
            lambda: self.samples.on_disk(held),
            lambda: self._write(taken, moment, started, waited),
        )

    def _write(
        self, taken: Checkpoint, moment: Moment, started: float, waited: float
    ) -> WrittenCheckpoint:
        """Writes a checkpoint that was taken at ``started``; from the thread of the background."""
        assert self.folder is not None
        folder = self.folder.checkpoints(self.samples.source)
        path, failure = None, None
        try:
            self._copy.wait()
            self.folder.sync()
            path = checkpoint.save(folder, taken, keep=self.kept, label=moment.label)
            self._newest = started
            if self._moved:
                needed = checkpoint.ranks_of(folder)
                self.samples.remove_others(needed)
                self._moved = needed != {self.ranks.size}
        except Exception as error:  # told by the loop's own thread
            failure = error
        seconds = self.clock() - started
        self.timer.took(seconds if failure is None else float("inf"))
        size = sum(value.numel() * value.itemsize for value in taken.tensors.values())
        return WrittenCheckpoint(taken.step, moment.pending, path, size, waited, seconds, failure)

    def _report(self) -> None:
        """Tells how the checkpoints ended that the background had."""
        for written in self.writer.collect():
            if written.error is not None:
                self._warn(f"iteration {written.step}, {written.error}")
            else:
                self.told(written)

    def _warn(self, why: str) -> None:
        age = "There is none"
        if self._newest is not None:
            age = f"The newest is {self.clock() - self._newest:.0f} s old"
        warnings.warn(
            f"the checkpoint was not written: {why}. {age}, a kill loses what came after; the run "
            "goes on and tries again",
            SaveWarning,
            stacklevel=3,
        )
