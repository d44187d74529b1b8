"""The state of a loop, and how it outlives the process: what is saved when, and what a restored
loop goes on from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpfast.errors import InputError, SaveWarning
from dpfast.parallel import Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import rank_folder, remove_rank_folders
from dpfast.pool.reader import open_folder, open_share
from dpfast.pool.saver import SHARD_BYTES, Saver, through_jpeg
from dpfast.pool.sharded import ShardLayout, pool_of_ranks
from dpfast.pool.shards import DamagedPoolError, Manifest
from dpfast.practice import checkpoint
from dpfast.practice.background import BackgroundWriter, CheckpointTimer, HostCopy, Written
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.disk import Needs, check_disk, checkpoint_bytes, samples_to_come
from dpfast.practice.overlap import OverlappedSource
from dpfast.practice.run_folder import RunPaths, RunWriter
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost

if TYPE_CHECKING:
    from dpfast.practice.loop import Loop

PROGRESS_SECONDS = 30.0  # of generation between two savings of a round's samples
RETRY_SECONDS = 60.0  # between two attempts to save samples that the disk has refused
# seconds that a run waits for samples of other ranks whose checkpoint is kept for good, or is the
# last
GRACE = 20.0


@dataclass
class LoopState:
    """Where a loop stands, beside the learner's weights, the loader's position and the patience;
    JSON holds it.
    """

    round: int = -1  # the newest complete one; round 0 are the initial samples
    round_start: int = 0  # the pool's size before it, or before the pending one
    pending: bool = True  # the next round is due, or being made
    rounds: list[int] = field(default_factory=list)  # the samples of every complete one
    frozen: bool = False  # a branch: no more additions
    finished: bool = False
    moments: list[int] = field(default_factory=list)  # the steps after which samples were added
    per_class: list[float | None] | None = (
        None  # of the last evaluation; None for a class without images
    )
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    waited: float = 0.0  # for batches, in the lives of the run before this one


class LoopCheckpointer:
    """Saves a loop in the folder of its run, and restores it; without a folder it does nothing.

    A checkpoint is written at the start, before and after every round and at the end, and by time
    at evaluations, or between two where they are further apart than ``checkpoint_minutes``
    (``CheckpointTimer``). While a round is pending, the newest checkpoint is of the moment before
    it, and ``progress`` holds the samples that it has so far.

    Every rank saves the samples that it holds, in its own part of the pool's folder. The first one
    copies its state and writes it in the background, as soon as the parts' manifests hold what the
    checkpoint promises. Any number of ranks can read it; parts of other numbers that no checkpoint
    needs are then removed.

    The clock of the first rank decides. At an evaluation it does so alone, as the others have
    nothing to give; between two, its wish travels with the message in which ranks ask each other to
    stop.
    """

    def __init__(self, loop: Loop, folder: RunPaths | None) -> None:
        self.loop, self.folder = loop, folder
        self.layout = ShardLayout(loop.ranks, loop.recipe.generator.batch_size)
        self.clock, practice = (
            loop.ranks.heartbeat.clock.now,
            loop.recipe.practice,
        )  # all times of saving are its own
        self.timer = CheckpointTimer(
            practice.checkpoint_share, practice.checkpoint_minutes, self.clock
        )
        self.writer, self._copy = BackgroundWriter(), HostCopy()
        self._saver: Saver | None = None
        self._moved = True  # whether there may be samples that another number of ranks has saved
        self._pending_label: str | None = None  # of the checkpoint that was begun last
        self._newest: float | None = None  # when the newest checkpoint was taken
        self._tried = self.clock()

    @property
    def _writes(self) -> bool:
        """Whether this process writes the checkpoints."""
        return isinstance(self.folder, RunWriter) and self._saver is not None

    @property
    def _grace(self) -> float:
        """How long a checkpoint that must not be lost may wait for its samples: not at all where
        saving has stopped.
        """
        return GRACE if self._saver is not None and self._saver.error is None else 0.0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Within it the pool's samples are saved in the background."""
        loop, images = self.loop, self.loop.recipe.pool.save_samples
        if self.folder is None or loop.state.finished or images == "none":
            yield
            return
        folder, others = rank_folder(self.folder.pool(loop.name), loop.ranks), loop.ranks.size - 1
        reserve = 2 * checkpoint_bytes(loop.trainer.model) + others * SHARD_BYTES
        with Saver(
            loop.local,
            folder,
            images=images,
            classes=loop.pipeline.class_names,
            truncate=True,
            reserve=reserve,
        ) as self._saver:
            self._saver.save()  # what another number of ranks had saved
            try:
                yield
            finally:
                self._saver.wait()
                self.writer.clear(self._grace)
                self._report()

    def newest(self) -> str | None:
        """The path of the newest checkpoint, if there is one."""
        self.writer.clear()
        saved = (
            [] if self.folder is None else checkpoint.paths(self.folder.checkpoints(self.loop.name))
        )
        return str(saved[-1]) if saved else None

    def check_disk(self) -> None:
        """Before the first sample: whether the disk has room for all. Before a later round: for
        that.

        Raises ``InputError`` on all ranks.
        """
        if self.folder is None:
            return
        loop, needs = self.loop, None
        first, size = loop.state.round < 0, loop.state.round_start
        if isinstance(self.folder, RunWriter):
            count = samples_to_come(loop) if first else loop.source.available(size)
            saved = [] if self._saver is None else self._saver.shards
            needs = Needs.of(loop, count, saved, self.folder.checkpoints(loop.name))
        check_disk(
            loop.ranks,
            needs,
            self.folder.path,
            "the run" if first else f"round {loop.state.round + 1}",
        )

    def overdue(self) -> bool:
        """Whether this rank asks for a checkpoint between two evaluations."""
        return self._writes and self.timer.overdue() and not self.writer.writing

    def evaluated(self) -> None:
        """After an evaluation, from which every rank's sum of losses begins anew: a checkpoint if
        it is time.
        """
        self._retry()
        self._report()
        if not self._writes:
            return
        free = not self.timer.limit or not self.writer.writing
        if self._last_before_cooldown() or (free and self.timer.due()):
            self._begin(torch.zeros(self.loop.ranks.size))

    def save(self, *, wait: bool = False) -> None:
        """A checkpoint of this moment, which all ranks ask for; ``wait``: it is on the disk when
        this returns.

        One that the disk refuses is a warning: training goes on.
        """
        loop = self.loop
        if self._saver is None:
            return
        if wait:
            held = self._held()
            if self._saver.wait() < held:
                self._saver.save()
            if loop.ranks.any(self._saver.wait() < held):
                self._warn(
                    f"{self._saver.saved} of the {held} samples of {loop.ranks} are on the disk"
                )
                return
        self._retry()
        losses = loop.ranks.all_gather(loop.losses.total)
        if self._writes:
            self._begin(losses)
            if wait:
                self.writer.wait()
        self._report()

    def _held(self, rank: int | None = None) -> int:
        """How many samples of the complete rounds a rank holds."""
        return replace(self.layout, rounds=tuple(self.loop.state.rounds)).held(rank)

    def _begin(self, losses: Tensor) -> None:
        """Copies the state and writes it in the background. losses: (ranks,) the sums since the
        last evaluation.
        """
        assert isinstance(self.folder, RunWriter)
        started, loop, folder = self.clock(), self.loop, self.folder
        kept = self._pending_label is not None
        if self.writer.clear(self._grace if kept else 0.0) and (kept or self.timer.overdue()):
            self._warn("not all samples that it promises are on the disk")
        try:
            record, tensors = self._state()
        except OSError as error:  # of lines that it would promise
            self._warn(str(error))
            return
        tensors = self._copy.take({"loss_sum": losses, **tensors})
        step, label, held = (
            loop.trainer.step_count,
            self._label(),
            [self._held(r) for r in range(loop.ranks.size)],
        )
        self._pending_label, waited = label, self.clock() - started
        size = sum(value.numel() * value.itemsize for value in tensors.values())

        def write() -> Written:
            path, failure = None, None
            try:
                self._copy.wait()
                folder.sync()
                kept = loop.recipe.practice.checkpoints_kept
                path = checkpoint.save(
                    folder.checkpoints(loop.name), step, tensors, record, keep=kept, label=label
                )
                self._newest = started
                self._remove_parts(folder)
            except Exception as error:  # told by the loop's own thread
                failure = error
            seconds = self.clock() - started
            self.timer.took(seconds if failure is None else float("inf"))
            return Written(step, path, size, waited, seconds, failure)

        self.timer.begun()
        self.writer.begin(lambda: self._on_disk(held), write)

    def _on_disk(self, held: list[int]) -> bool:
        """Whether the ranks have saved so many samples: this one says so, of others what they have
        promised counts.
        """
        loop, saver = self.loop, self._saver
        assert self.folder is not None
        assert saver is not None
        folder = self.folder.pool(loop.name)
        return saver.saved >= held[loop.ranks.rank] and all(
            count == 0 or _promised(rank_folder(folder, loop.ranks, rank)) >= count
            for rank, count in enumerate(held)
            if rank != loop.ranks.rank
        )

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint holds beside the losses: a record for JSON and tensors where they
        lie.
        """
        assert isinstance(self.folder, RunWriter)
        loop, state = self.loop, self.loop.state
        now = replace(state, waited=state.waited + loop.loader.waited)
        record = {
            "loop": dataclasses.asdict(now),
            "samples": sum(state.rounds),
            "ranks": loop.ranks.size,
            "iterations": loop.trainer.iterations,
            "loader": loop.loader.state_dict(),
            "patience": loop.patience.state_dict(),
            "cost": loop.source.cost.state_dict(),
            "initial_cost": loop.initial_cost.state_dict(),
            "overlap": None,
            "written": self.folder.written(),
        }
        tensors = checkpoint.prefixed("trainer", loop.trainer.state_dict())
        if isinstance(loop.source, OverlappedSource):
            record["overlap"], weights = loop.source.state_dict()
            tensors |= checkpoint.prefixed("overlap", weights)
        return record, tensors

    def _label(self) -> str | None:
        """Of a checkpoint of this moment, where it is kept: before an addition, or the last before
        the cool-down.
        """
        state = self.loop.state
        if self.loop.recipe.practice.keep_rounds and state.pending and state.round >= 0:
            return checkpoint.of_round(state.round)
        return checkpoint.STABLE if self._last_before_cooldown() else None

    def _last_before_cooldown(self) -> bool:
        """Whether the next evaluation is in the cool-down already: from here a run can still be
        made longer.
        """
        trainer, interval = self.loop.trainer, self.loop.interval
        due = trainer.step_count % interval == 0
        return due and not trainer.cooling and trainer.cooling_at(trainer.step_count + interval)

    def _remove_parts(self, folder: RunWriter) -> None:
        """Removes what other numbers of ranks had saved, once no checkpoint needs it."""
        if self._moved:
            name, size = self.loop.name, self.loop.ranks.size
            needed = {state["ranks"] for state in checkpoint.states(folder.checkpoints(name))}
            remove_rank_folders(folder.pool(name), needed)
            self._moved = needed != {size}

    def _report(self) -> None:
        """Tells how the checkpoints ended that the background had."""
        for written in self.writer.collect():
            if written.error is not None:
                self._warn(f"iteration {written.step}, {written.error}")
            elif isinstance(self.folder, RunWriter):
                self.folder.time(
                    "checkpoint",
                    self.loop.name,
                    written.step,
                    waited=written.waited,
                    seconds=written.seconds,
                    bytes=written.bytes,
                )

    def _warn(self, why: str) -> None:
        age = (
            "there is none"
            if self._newest is None
            else f"the newest is {self.clock() - self._newest:.0f} s old"
        )
        warnings.warn(
            f"the checkpoint was not written: {why}. {age[0].upper()}{age[1:]}, a kill loses what "
            "came after; the run "
            "goes on and tries again",
            SaveWarning,
            stacklevel=3,
        )

    def _retry(self) -> None:
        """Saves again what the disk has refused, now and then."""
        refused = self._saver is not None and self._saver.error is not None
        if refused and self.clock() - self._tried >= RETRY_SECONDS:
            self._tried = self.clock()
            self.save_samples()

    def payload(self, batch: SampleBatch) -> Tensor | None:
        """What the pool keeps of a batch in the place of its images: what JPEG leaves of them, or
        nothing else.
        """
        if self.loop.recipe.pool.save_samples != "jpeg":
            return None
        return (
            through_jpeg(batch.images)[0]
            if self._saver is None
            else self._saver.encoded(batch.images)
        )

    def save_samples(self) -> None:
        """Begins to save what was appended to the pool."""
        if self._saver is not None:
            self._saver.save()

    def on_the_way(self, batches: Iterator[SampleBatch]) -> Iterator[SampleBatch]:
        """The batches of a round that can go on in its middle; saves its samples now and then, and
        when asked to stop.

        The samples of the last half minute are asked for, and noted as progress at the first batch
        that finds them on the disk. A batch counts as appended when the next one is asked for.
        Raises ``Stopped``.
        """
        loop, begun = self.loop, self.clock()
        asked: dict[str, Any] | None = None
        for batch in batches:
            yield batch
            saver = self._saver
            if saver is not None and asked is not None and saver.saved >= asked["samples"]:
                self._note(asked)
                begun, asked = self.clock(), None
            if saver is not None and (
                loop.stop.requested or self.clock() - begun > PROGRESS_SECONDS
            ):
                asked = {
                    "round": loop.state.round + 1,
                    "samples": len(loop.local),
                    "cost": loop.source.cost.state_dict(),
                }
                begun = self.clock()
                saver.save()
                if loop.stop.requested and saver.wait() == asked["samples"]:
                    self._note(asked)
            loop.stop.check()

    def _note(self, progress: dict[str, Any]) -> None:
        assert self.folder is not None
        self.folder.save_progress(self.loop.name, progress)

    def restore(self, start: Checkpoint) -> None:
        """Puts the loop where the checkpoint was taken; what follows equals the whole run bit by
        bit on a CPU.
        """
        loop, record = self.loop, start.state
        loop.trainer.load_state_dict(checkpoint.part("trainer", start.tensors))
        losses = start.tensors["loss_sum"]
        loop.losses.total.copy_(
            losses[loop.ranks.rank] if len(losses) == loop.ranks.size else losses.mean()
        )
        loop.state = LoopState(**record["loop"])
        loop.loader.load_state_dict(record["loader"])
        loop.losses.anchor(loop.trainer.step_count)
        loop.patience.load_state_dict(record["patience"])
        loop.source.cost.load_state_dict(record["cost"])
        loop.initial_cost.load_state_dict(record["initial_cost"])
        loop.cost_before = Cost(**record["cost"])
        if isinstance(loop.source, OverlappedSource):
            loop.source.load_state_dict(
                record["overlap"], checkpoint.part("overlap", start.tensors)
            )
        local = self._saved_pool(record["ranks"])
        layout = replace(self.layout, rounds=tuple(loop.state.rounds))
        loop.pool = loop.loader.pool = pool_of_ranks(local, layout)

    def _saved_pool(self, size: int) -> SamplePool:
        """This rank's samples out of what ``size`` ranks saved, and what it had made of a round on
        the way.
        """
        assert self.folder is not None
        loop, folder = self.loop, self.folder.pool(self.loop.name)
        wanted = replace(self.layout, rounds=tuple(loop.state.rounds))
        saved = replace(wanted, ranks=Ranks(size=size))
        placed: dict[str, Any] = {
            name: getattr(loop.local, name) for name in ("tiers", "chunk_bytes", "decode")
        }
        placed["beat"] = loop.ranks.beat
        progress = (
            self.folder.progress(loop.name) if loop.state.pending and loop.source.streams else None
        )
        if progress is not None and (
            progress["round"] != loop.state.round + 1 or size != loop.ranks.size
        ):
            progress = None
        if progress is not None and progress["samples"] > wanted.held():
            with contextlib.suppress(DamagedPoolError):
                pool = open_folder(
                    rank_folder(folder, loop.ranks), limit=progress["samples"], **placed
                )
                loop.source.cost.load_state_dict(progress["cost"])
                return pool
        if not wanted.held():
            return loop.local
        try:
            return open_share(folder, saved, wanted, **placed)
        except DamagedPoolError as error:
            raise InputError(f"resume: {error}") from error


def _promised(folder: Path) -> int:
    """How many samples the manifest of a rank's part promises."""
    try:
        return Manifest.read(folder).samples
    except DamagedPoolError:
        return 0
