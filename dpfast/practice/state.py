"""The state of a loop, and how it outlives the process: what is saved when, and what a restored loop goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dpfast.config import RecipeError
from dpfast.generate.trajectory import SampleBatch
from dpfast.parallel import Ranks
from dpfast.pool.parts import open_part, part_folder, remove_parts
from dpfast.pool.pool import SamplePool
from dpfast.pool.saver import Saver, open_pool, unsaved
from dpfast.pool.shards import DamagedPoolError
from dpfast.pool.union import Layout, UnionPool
from dpfast.practice import checkpoint
from dpfast.practice.checkpoint import Checkpoint
from dpfast.practice.costs import Cost
from dpfast.practice.overlap import Overlapped
from dpfast.practice.run_folder import Places, RunFolder

if TYPE_CHECKING:
    from dpfast.practice.loop import Loop

PROGRESS_SECONDS = 30.0  # of generation between two savings of a round's samples


@dataclass
class State:
    """Where a loop stands, beside the learner's weights, the loader's position and the patience; JSON holds it."""

    round: int = -1  # the newest complete one; round 0 are the initial samples
    round_start: int = 0  # the pool's size before it, or before the pending one
    pending: bool = True  # the next round is due, or being made
    rounds: list[int] = field(default_factory=list)  # the samples of every complete one
    frozen: bool = False  # a branch: no more additions
    finished: bool = False
    moments: list[int] = field(default_factory=list)  # the steps after which samples were added
    per_class: list[float | None] | None = None  # of the last evaluation; None for a class without images
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    waited: float = 0.0  # for batches, in the lives of the run before this one


class Keeper:
    """Saves a loop in the folder of its run, and restores it; without a folder it does nothing.

    A checkpoint is written at the start, after every evaluation and after every round. While a round is pending, the
    newest checkpoint is of the moment before it, and ``progress`` holds the samples that it has so far.

    Every rank saves the samples that it holds, in its own part of the pool's folder. When all have, the first writes a
    checkpoint, which any number of ranks can read, and removes the parts of other numbers that no checkpoint needs.
    """

    def __init__(self, loop: Loop, folder: Places | None) -> None:
        self.loop, self.folder = loop, folder
        self.layout = Layout(loop.ranks, loop.recipe.generator.generation_batch)
        self._saver: Saver | None = None
        self._moved = True  # whether there may be samples that another number of ranks has saved

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Within it the pool's samples are saved in the background."""
        if self.folder is None or self.loop.state.finished:
            yield
            return
        names, folder = self.loop.pipeline.class_names, part_folder(self.folder.pool(self.loop.name), self.loop.ranks)
        images = self.loop.recipe.pool.save_samples
        with Saver(self.loop.local, folder, images=images, classes=names, truncate=True) as self._saver:
            yield

    def newest(self) -> str | None:
        """The path of the newest checkpoint, if there is one."""
        saved = [] if self.folder is None else checkpoint.paths(self.folder.checkpoints(self.loop.name))
        return str(saved[-1]) if saved else None

    def save(self) -> None:
        """A checkpoint of this moment. One that the disk refuses is a warning: training goes on."""
        loop, state = self.loop, self.loop.state
        if self.folder is None or self._saver is None:
            return
        held = replace(self.layout, rounds=tuple(state.rounds)).held()
        if self._saver.wait() < held:
            self._saver.save()  # a checkpoint must not promise samples that are not on the disk: try again
        if loop.ranks.any(self._saver.wait() < held):
            return
        losses = loop.ranks.each(loop.losses.total)
        if not isinstance(self.folder, RunFolder):
            return
        now = replace(state, waited=state.waited + loop.loader.waited)
        record = {
            "loop": dataclasses.asdict(now),
            "samples": sum(state.rounds),
            "ranks": loop.ranks.size,
            "loader": loop.loader.state(),
            "patience": loop.patience.state(),
            "cost": loop.source.cost.state(),
            "initial_cost": loop.initial_cost.state(),
            "overlap": None,
        }
        tensors = {"loss_sum": losses, **checkpoint.prefixed("trainer", loop.trainer.state())}
        if isinstance(loop.source, Overlapped):
            record["overlap"], weights = loop.source.state()
            tensors |= checkpoint.prefixed("overlap", weights)
        practice = loop.recipe.practice
        ended = state.round if practice.keep_rounds and state.pending and state.round >= 0 else None
        folder, step = self.folder.checkpoints(loop.name), loop.trainer.step_count
        with unsaved("the checkpoint was not written"):
            record["written"] = self.folder.written()
            checkpoint.save(folder, step, tensors, record, keep=practice.checkpoints_kept, round=ended)
            if self._moved:
                needed = {state["ranks"] for state in checkpoint.states(folder)}
                remove_parts(self.folder.pool(loop.name), needed)
                self._moved = needed != {loop.ranks.size}

    def save_samples(self) -> None:
        """Begins to save what was appended to the pool."""
        if self._saver is not None:
            self._saver.save()

    def on_the_way(self, batches: Iterator[SampleBatch]) -> Iterator[SampleBatch]:
        """The batches of a round that can go on in its middle; saves its samples now and then, and when asked to stop.

        A batch counts as appended when the next one is asked for. Raises ``Stopped``.
        """
        loop, saved = self.loop, time.perf_counter()
        for batch in batches:
            yield batch
            asked = loop.stop.requested
            if asked or time.perf_counter() - saved > PROGRESS_SECONDS:
                if self.folder is not None and self._saver is not None:
                    self._saver.save()
                    if self._saver.wait() == len(loop.local):
                        number, cost = loop.state.round + 1, loop.source.cost.state()
                        self.folder.save_progress(
                            loop.name, {"round": number, "samples": len(loop.local), "cost": cost}
                        )
                saved = time.perf_counter()
            loop.stop.check()

    def restore(self, start: Checkpoint) -> None:
        """Puts the loop where the checkpoint was taken; what follows equals the whole run bit by bit on a CPU."""
        loop, record = self.loop, start.state
        loop.trainer.restore(checkpoint.part("trainer", start.tensors))
        losses = start.tensors["loss_sum"]
        loop.losses.total.copy_(losses[loop.ranks.rank] if len(losses) == loop.ranks.size else losses.mean())
        loop.state = State(**record["loop"])
        loop.loader.restore(record["loader"])
        loop.losses.anchor(loop.trainer.step_count)
        loop.patience.restore(record["patience"])
        loop.source.cost.restore(record["cost"])
        loop.initial_cost.restore(record["initial_cost"])
        loop.cost_before = Cost(**record["cost"])
        if isinstance(loop.source, Overlapped):
            loop.source.restore(record["overlap"], checkpoint.part("overlap", start.tensors))
        loop.local = loop.pool = loop.loader.pool = self._saved_pool(record["ranks"])
        if not loop.ranks.alone:
            layout = replace(self.layout, rounds=tuple(loop.state.rounds))
            loop.pool = loop.loader.pool = UnionPool(loop.local, layout)

    def _saved_pool(self, size: int) -> SamplePool:
        """This rank's samples out of what ``size`` ranks saved, and what it had made of a round on the way."""
        assert self.folder is not None
        loop, folder = self.loop, self.folder.pool(self.loop.name)
        wanted = replace(self.layout, rounds=tuple(loop.state.rounds))
        saved = replace(wanted, ranks=Ranks(size=size))
        placed: dict[str, Any] = {name: getattr(loop.local, name) for name in ("tiers", "chunk_bytes", "decode")}
        placed["told"] = loop.ranks.beat
        progress = self.folder.progress(loop.name) if loop.state.pending and loop.source.streams else None
        if progress is not None and (progress["round"] != loop.state.round + 1 or size != loop.ranks.size):
            progress = None
        if progress is not None and progress["samples"] > wanted.held():
            with contextlib.suppress(DamagedPoolError):
                pool = open_pool(part_folder(folder, loop.ranks), limit=progress["samples"], **placed)
                loop.source.cost.restore(progress["cost"])
                return pool
        if not wanted.held():
            return loop.local
        try:
            return open_part(folder, saved, wanted, **placed)
        except DamagedPoolError as error:
            raise RecipeError(f"resume: {error}") from error
