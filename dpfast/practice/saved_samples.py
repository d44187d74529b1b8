"""The samples of a loop and their copy on the disk, which grows in the background.

Every rank saves the samples that it holds, in its own part of the pool's folder
(``dpfast.pool.rank_folders``). Any number of ranks can read them; parts of other numbers that no
checkpoint needs are then removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.parallel import Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.protocol import Pool
from dpfast.pool.rank_folders import rank_folder, remove_rank_folders
from dpfast.pool.reader import open_folder, open_share
from dpfast.pool.saver import Saver, through_jpeg
from dpfast.pool.sharded import ShardLayout, pool_of_ranks
from dpfast.pool.shards import DamagedPoolError, Manifest, Shard
from dpfast.practice.loop_state import LoopState
from dpfast.practice.run_paths import RunPaths
from dpfast.practice.stopping import Stop
from dpfast.samples import SampleBatch

NOTED_SECONDS = 30.0  # of generation between two savings of a round's samples
RETRY_SECONDS = 60.0  # between two attempts to save samples that the disk has refused


class SavedSamples:
    """The pool that a loop trains on, which is saved while ``saving`` is entered.

    pool: what is trained on. folder: of the run; None: nothing is kept. source: the loop's. state:
    the loop's, which says which rounds are complete. within_round: after ``load_state_dict``, what
    was noted of a round that was cut short; its samples are in the pool.
    """

    def __init__(
        self,
        pool: Pool,
        state: LoopState,
        folder: RunPaths | None,
        source: str,
        recipe: Recipe,
        ranks: Ranks,
    ) -> None:
        self.pool = pool
        self.state = state
        self.folder = folder
        self.source = source
        self.seed = recipe.seed
        self.kept_as = recipe.pool.save_samples
        self.ranks = ranks
        self.clock = ranks.heartbeat.clock.now
        self.within_round: dict[str, Any] | None = None
        self._layout = ShardLayout(ranks, recipe.generator.batch_size)
        self._saver: Saver | None = None
        self._tried = self.clock()

    @property
    def saves(self) -> bool:
        """True if samples are saved at this moment."""
        return self._saver is not None

    @property
    def refused(self) -> bool:
        """True if saving has stopped, as on a full disk."""
        return self._saver is not None and self._saver.error is not None

    @property
    def saved(self) -> int:
        """The number of this rank's samples that are on the disk for good."""
        return 0 if self._saver is None else self._saver.saved

    @property
    def shards(self) -> list[Shard]:
        """The manifest of this rank's samples on the disk."""
        return [] if self._saver is None else self._saver.shards

    def held(self, rank: int | None = None) -> int:
        """Counts the samples of the complete rounds that this rank, or ``rank``, holds."""
        return self._complete.held(rank)

    @property
    def _complete(self) -> ShardLayout:
        return replace(self._layout, rounds=tuple(self.state.rounds))

    @contextlib.contextmanager
    def saving(self, classes: tuple[str, ...], *, reserve: int) -> Iterator[None]:
        """Saves samples in the background within a ``with`` block.

        classes: names of the labels; reserve: bytes of the disk that are left to others.
        """
        assert self.folder is not None
        with Saver(
            self.pool.local,
            rank_folder(self.folder.pool(self.source), self.ranks),
            images=self.kept_as,
            classes=classes,
            truncate=True,
            reserve=reserve,
        ) as self._saver:
            self._saver.save()  # what another number of ranks had saved
            try:
                yield
            finally:
                self._saver.wait()

    def append(
        self,
        batch: SampleBatch,
        *,
        round: int,
        omega: float | Tensor,
        cfg_scale: float,
        steps: int,
    ) -> None:
        """Adds a batch to the samples that this rank holds."""
        self.pool.local.append(
            batch,
            payload=self._payload(batch),
            round=round,
            omega=omega,
            cfg_scale=cfg_scale,
            steps=steps,
            seed=self.seed,
        )

    def _payload(self, batch: SampleBatch) -> Any:
        """Returns the payload that the pool keeps in the place of a batch's images: their files, or
        what JPEG leaves of them; None: the images.
        """
        if self.pool.local.codec == "jpeg":
            return batch.files
        if self.kept_as != "jpeg":
            return None
        if self._saver is None:
            return through_jpeg(batch.images)[0]
        return self._saver.encoded(batch.images)

    def save(self) -> None:
        """Begins to save what the pool holds."""
        if self._saver is not None:
            self._saver.save()

    def retry(self) -> None:
        """Saves again what the disk has refused, now and then."""
        if self.refused and self.clock() - self._tried >= RETRY_SECONDS:
            self._tried = self.clock()
            self.save()

    def wait(self) -> bool:
        """Waits until this rank's samples of complete rounds are on the disk; False where the disk
        refuses.
        """
        assert self._saver is not None
        if self._saver.wait() < self.held():
            self._saver.save()
        return self._saver.wait() >= self.held()

    def on_disk(self, held: list[int]) -> bool:
        """Returns True if each rank has saved as many samples as ``held`` says: this one knows, of
        others what their manifests promise counts.
        """
        assert self.folder is not None
        folder = self.folder.pool(self.source)
        return self.saved >= held[self.ranks.rank] and all(
            count == 0 or _promised(folder, self.ranks, rank) >= count
            for rank, count in enumerate(held)
            if rank != self.ranks.rank
        )

    def remove_others(self, needed: Collection[int]) -> None:
        """Removes what other numbers of ranks than ``needed`` have saved."""
        assert self.folder is not None
        remove_rank_folders(self.folder.pool(self.source), needed)

    def noted(
        self, batches: Iterator[SampleBatch], source_state: Callable[[], dict[str, Any]], stop: Stop
    ) -> Iterator[SampleBatch]:
        """Yields the batches of a round that can go on in its middle; saves its samples now and
        then, and when asked to stop.

        The samples of the last half minute are asked for, and noted as progress at the first batch
        that finds them on the disk. A batch counts as appended when the next one is asked for.
        Raises ``Stopped``.
        """
        begun = self.clock()
        asked: dict[str, Any] | None = None
        for batch in batches:
            yield batch
            if asked is not None and self.saved >= asked["samples"]:
                self._note(asked)
                begun = self.clock()
                asked = None
            if self.saves and (stop.requested or self.clock() - begun > NOTED_SECONDS):
                asked = {
                    "round": self.state.round + 1,
                    "samples": len(self.pool.local),
                    "source": source_state(),
                }
                begun = self.clock()
                self.save()
                if stop.requested and self._all_saved() == asked["samples"]:
                    self._note(asked)
            stop.check()

    def _all_saved(self) -> int:
        return 0 if self._saver is None else self._saver.wait()

    def _note(self, progress: dict[str, Any]) -> None:
        assert self.folder is not None
        self.folder.save_progress(self.source, progress)

    def state_dict(self) -> dict[str, Any]:
        """Returns the holders of the samples, which themselves are on the disk."""
        return {"ranks": self.ranks.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Opens what was saved: this rank's samples of complete rounds, and what it had made of a
        round that was cut short. The loop's state has been loaded before.
        """
        local = self._opened(state["ranks"])
        self.pool = pool_of_ranks(local, self._complete)

    def _opened(self, size: int) -> SamplePool:
        assert self.folder is not None
        local = self.pool.local
        folder = self.folder.pool(self.source)
        placed: dict[str, Any] = {
            "tiers": local.tiers,
            "chunk_bytes": local.chunk_bytes,
            "decode": local.decode,
            "beat": self.ranks.beat,
        }
        noted = self._noted_progress(size)
        if noted is not None:
            with contextlib.suppress(DamagedPoolError):
                part = rank_folder(folder, self.ranks)
                pool = open_folder(part, limit=noted["samples"], **placed)
                self.within_round = noted
                return pool
        if not self.held():
            return local
        saved = replace(self._complete, ranks=Ranks(size=size))
        try:
            return open_share(folder, saved, self._complete, **placed)
        except DamagedPoolError as error:
            raise InputError(f"resume: {error}") from error

    def _noted_progress(self, size: int) -> dict[str, Any] | None:
        """Returns the note about the pending round; None where that is of no use."""
        assert self.folder is not None
        noted = self.folder.progress(self.source) if self.state.pending else None
        if noted is None or noted["round"] != self.state.round + 1 or size != self.ranks.size:
            return None
        return noted if noted["samples"] > self.held() else None


def _promised(folder: Path, ranks: Ranks, rank: int) -> int:
    """Counts the samples that the manifest of a rank's part promises."""
    try:
        return Manifest.read(rank_folder(folder, ranks, rank)).samples
    except DamagedPoolError:
        return 0
