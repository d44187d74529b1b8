"""The pools of all ranks as one: who holds which sample, and how a training batch comes together.

A sample stays in the memory of the rank that made it. The order of training is that of one pool
(``dpfast.feed.order``) and every rank knows it; so each rank sends the others what it holds of
their parts of the batch, as it is stored, in one all-to-all. Who sends how much to whom is
arithmetic, and labels and lengths of files are known everywhere (8 bytes a sample, 73 MB of 9.1 M),
gathered once a round: a step has no collective on the host.

The alternatives were dropped for these reasons. A copy of every sample on every rank: 1.3 TB for
ImageNet-1k at its end, times the ranks. Every rank draws from what it made itself: other batches on
another number of ranks, and samples that the mixing pairs apart. At 224 px a batch of 4,096 is 617
MB of uint8; on W ranks each sends and receives (W - 1)/W^2 of it, 67 MB of 8 ranks, 0.1 ms a step
of NVLink's 450 GB/s one way (derived), and it goes on while the learner works.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dpfast.ops.chunk_rows import ChunkTable
from dpfast.ops.dispatch import CPU
from dpfast.parallel import Ranks
from dpfast.pool.pool import SamplePool
from dpfast.pool.protocol import Pool
from dpfast.pool.record import RECORD
from dpfast.pool.snapshot import PoolSnapshot

KNOWN = np.dtype([("label", "<i4"), ("length", "<i4")])  # of a sample, on every rank


@dataclass(frozen=True)
class ShardLayout:
    """The owners of the union's rows: rounds of samples, each dealt to ``ranks.size`` ranks in
    batches, in turn.

    A rank holds its rows in their order. batch: the samples of a batch; rounds: the sizes of the
    complete rounds.
    """

    ranks: Ranks
    batch: int
    rounds: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(self.rounds)

    @property
    def turn(self) -> int:
        """The rank of the next round's first batch: goes on where the last round ended, so that
        shares stay even.
        """
        return sum(-(-count // self.batch) for count in self.rounds) % self.ranks.size

    def with_round(self, count: int) -> ShardLayout:
        """Returns the layout with another round of ``count`` samples behind it."""
        return replace(self, rounds=(*self.rounds, count))

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of every round: its first one, its turn, and what each rank holds before it,
        (rounds + 1, size).
        """
        size = self.ranks.size
        rounds = len(self.rounds)
        starts = torch.zeros(rounds, dtype=torch.int64)
        turns: list[int] = []
        before = torch.zeros(rounds + 1, size, dtype=torch.int64)
        for i, count in enumerate(self.rounds):
            turn = replace(self, rounds=self.rounds[:i]).turn
            turns.append(turn)
            starts[i] = sum(self.rounds[:i])
            for rank in range(size):
                before[i + 1, rank] = before[i, rank] + self.ranks.share(
                    count, self.batch, turn=turn, rank=rank
                )
        return starts, torch.tensor(turns, dtype=torch.int64), before

    def held(self, rank: int | None = None) -> int:
        """Counts the rows that this rank, or ``rank``, holds."""
        return int(self._table[2][-1, self.ranks.rank if rank is None else rank])

    def rows(self, rank: int | None = None) -> list[range]:
        """Returns the rows of this rank, or of ``rank``, a batch at a time."""
        rank = self.ranks.rank if rank is None else rank
        starts, turns, _ = self._table
        return [
            range(start + part.start, start + part.stop)
            for count, start, turn in zip(self.rounds, starts.tolist(), turns.tolist(), strict=True)
            for part in self.ranks.batches(count, self.batch, turn=turn, rank=rank)
        ]

    def locate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ranks that hold ``rows`` (B,) of the union, and their rows there, both (B,)
        int64.
        """
        starts, turns, before = self._table
        size = self.ranks.size
        number = torch.searchsorted(starts, rows, right=True) - 1  # of the round
        in_round = rows - starts[number]
        batch = in_round // self.batch
        owner = (turns[number] + batch) % size
        first = (owner - turns[number]) % size  # the owner's first batch of that round
        in_owner = (batch - first) // size * self.batch + in_round % self.batch
        return owner, before[number, owner] + in_owner


def pool_of_ranks(local: SamplePool, layout: ShardLayout) -> Pool:
    """Returns the pool of all ranks of ``layout``, each of which holds its ``local``: that itself
    where one process is alone.

    Collective where ``layout`` has rounds.
    """
    return local if layout.ranks.alone else ShardedPool(local, layout)


class ShardedPool:
    """The ``Pool`` of several ranks: ``local`` is this rank's pool, of its own rows.

    The length counts complete rounds. ``column``, ``complete`` and ``fetch`` are collective, and so
    is the constructor where ``layout`` has rounds: all ranks call them together.
    """

    def __init__(self, local: SamplePool, layout: ShardLayout) -> None:
        self.local = local
        self.layout = layout
        self.ranks = layout.ranks
        self._known = np.empty(0, KNOWN)  # of every sample of complete rounds
        self._coloured = False  # as of ``PoolSnapshot``, of all ranks
        if layout.rounds:
            self._learn_of(0)

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def codec(self) -> str:
        return self.local.codec

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.local.shape

    @property
    def fresh(self) -> int:
        """The number of samples of the newest round."""
        return self.layout.rounds[-1] if self.layout.rounds else 0

    @property
    def turn(self) -> int:
        """The rank that makes the first batch of the next round."""
        return self.layout.turn

    def held(self, size: int) -> int:
        """Counts the samples that this rank holds of the first ``size``, which are all rounds
        before one.
        """
        return replace(self.layout, rounds=self.layout.rounds[: self._first_round(size)]).held()

    def complete(self, count: int) -> None:
        """Ends a round of ``count`` samples, which all ranks have appended."""
        layout = self.layout.with_round(count)
        if layout.held() != len(self.local):
            raise RuntimeError(
                f"{self.ranks} holds {len(self.local)} samples, {layout.held()} are its part"
            )
        self.layout = layout
        self._learn_of(len(layout) - count)

    def _learn_of(self, start: int) -> None:
        """Gathers what every rank knows of the samples from row ``start`` on, the start of a
        round.
        """
        names = ("label", "length") if self.codec == "jpeg" else ("label",)
        new = np.zeros(len(self) - start, KNOWN)
        for name in names:
            own = self.local.records(self.held(start))[name].astype(np.int64)
            new[name] = self._gathered(torch.from_numpy(own), start).numpy()
        self._known = np.concatenate([self._known[:start], new])
        if self.codec == "jpeg":
            self._coloured = self.ranks.any(self.local.snapshot.coloured)

    def images(self, indices: Tensor) -> Tensor:
        """Returns uint8 (B, C, H, W) of rows of this rank's own pool, whichever: for their
        shape.
        """
        return replace(self.local.snapshot, coloured=self._coloured).images(indices)

    def column(self, name: str, start: int = 0) -> Tensor:
        """Returns (N - start,) values of a column in the union's order, from row ``start`` on, the
        start of a round.
        """
        return self._gathered(self.local.column(name, self.held(start)), start)

    def _first_round(self, start: int) -> int:
        """Returns the round that begins at row ``start`` or after it."""
        rounds = self.layout.rounds
        return next((i for i in range(len(rounds)) if sum(rounds[:i]) >= start), len(rounds))

    def _gathered(self, values: Tensor, start: int) -> Tensor:
        """Returns (N - start,) of every rank's ``values``, those of its samples from row ``start``
        on.
        """
        rounds = self.layout.rounds
        first = self._first_round(start)
        parts = []
        layout = replace(self.layout, rounds=rounds[:first])
        for count in rounds[first:]:
            turn = layout.turn
            before = layout.held()
            layout = layout.with_round(count)
            mine, values = values.split(
                [layout.held() - before, len(values) - layout.held() + before]
            )
            parts.append(self.ranks.gather(mine, count, self.layout.batch, turn=turn))
        return torch.cat(parts) if parts else values[:0]

    def fetch(
        self,
        indices: Tensor,
        *,
        device: torch.device = CPU,
        parts: Sequence[Tensor] | None = None,
    ) -> tuple[PoolSnapshot, Tensor]:
        """Returns this rank's part of the rows ``indices`` (B,), which all ranks know: by
        ``parts``, or of a training batch.

        Returns a pool of the part's samples as they came in, on ``device``, and (b,) where the part
        lies there in its order. Of the columns it has the labels. Raises what a collective raises
        where another rank is gone.
        """
        ranks = self.ranks
        snapshot = self.local.snapshot
        owners, rows = self.layout.locate(indices)
        if parts is None:
            parts = [ranks.part(len(indices), rank) for rank in range(ranks.size)]
        wanted = [rows[part][owners[part] == ranks.rank] for part in parts]
        sent = [len(each) for each in wanted]
        mine = owners[parts[ranks.rank]]
        received = torch.bincount(mine, minlength=ranks.size).tolist()
        order = mine.argsort(stable=True)  # as the samples come in: rank by rank
        where = torch.empty_like(mine)
        where[order] = torch.arange(len(mine))
        columns = np.zeros(len(mine), RECORD)
        known = self._known[indices[parts[ranks.rank]][order].numpy()]
        columns["label"] = known["label"]
        columns["length"] = known["length"]
        # One thread: a loader's thread calls, see ``memory_tiers.touched``.
        stored = snapshot.payload(torch.cat(wanted), device=device, threads=1)
        if isinstance(stored, Tensor):
            stride = snapshot.chunks.stride
            payload = ranks.feed[device.type].all_to_all(
                stored.flatten(1).view(torch.uint8), sent, received
            )
            table = ChunkTable(max(len(mine), 1), stride).with_chunks([payload.view(-1)])
        else:
            table = self._files(stored, columns, sent, received)
        packed = torch.from_numpy(columns.view(np.uint8))
        origins = ChunkTable(max(len(mine), 1), RECORD.itemsize).with_chunks([packed])
        held = PoolSnapshot(
            snapshot.codec,
            snapshot.decode,
            table,
            origins,
            size=len(mine),
            shape=snapshot.shape,
            coloured=self._coloured,
        )
        return held, where

    def _files(
        self,
        files: Sequence[bytes],
        columns: np.ndarray,
        sent: Sequence[int],
        received: Sequence[int],
    ) -> ChunkTable:
        """Returns JPEG files, one behind the other; ``columns``, which say their lengths, get their
        new offsets.
        """
        lengths = columns["length"].astype(np.int64)
        ends = np.cumsum(lengths)
        columns["offset"] = ends - lengths
        out = [int(part.sum()) for part in np.split(lengths, np.cumsum(received)[:-1])]
        cut = np.cumsum([0, *sent])
        gone = [sum(map(len, files[a:b])) for a, b in itertools.pairwise(cut)]
        data = (
            torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
            if files
            else torch.empty(0).byte()
        )
        return ChunkTable(max(sum(out), 1), 1).with_chunks(
            [self.ranks.feed["cpu"].all_to_all(data, gone, out)]
        )
