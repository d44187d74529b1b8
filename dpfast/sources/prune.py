"""The source "prune": of an unguided surplus the samples of the highest entropy.

A round is made in turns: each rank makes a batch of candidates, the learner of that moment scores
it, ranks tell each other the scores, and all know alike which candidates are the best so far
(``Best``). A candidate that is out is dropped at once, the others are held by the rank that made
them (``HeldSamples``): between two turns there are never more than a round's samples, and within
one a batch more on each rank. At the end the samples go, in the order of their ids, to the ranks
to whom the pool's layout deals them.

What is held is saved every half minute, after the same turn on all ranks, and a run that goes on
from the checkpoint before the round goes on after that turn.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.files import numbered
from dpfast.generate.from_recipe import latent_shape
from dpfast.parallel import Ranks
from dpfast.pool.rank_folders import rank_folder_name, rank_folders
from dpfast.samples import SampleBatch
from dpfast.sources.best import LAST, Best
from dpfast.sources.dynamic import DynamicSource
from dpfast.sources.guided_methods import joined
from dpfast.sources.held import HeldSamples
from dpfast.sources.source import RoundRequest
from dpfast.sources.unguided import UnguidedSamples

log = logging.getLogger(__name__)
Ids = Callable[[Tensor], Tensor]  # of candidates by their numbers in a round
STEP = "step-{:09d}"  # the folder of a round, by its learner's
SAVED_SECONDS = 30.0  # of generation between two savings of what is held


class PruneSource(DynamicSource):
    """N unguided samples, then rounds of P: of ``oversample`` x P unguided candidates those of
    highest entropy.

    Candidates are scored by the learner of that moment and dropped when they are not kept; of
    equal entropies the smaller id is kept. Ids count candidates; with class counts of T samples the
    candidates for index i of the pool are i, i + T, i + 2 T, ..., which have its label, and of each
    class as many are kept as the order of labels gives the round. folder: where a round's samples
    are held while it is made; None: in memory.
    """

    def __init__(
        self,
        recipe: Recipe,
        unguided: UnguidedSamples,
        learner: nn.Module,
        *,
        moments: Collection[int] | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(recipe, unguided, learner, moments=moments)
        self.folder = folder
        self.ranks = unguided.ranks
        self.clock = self.ranks.heartbeat.clock.now
        self._trained = False

    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        self.streams = not request.number  # later rounds save by themselves what they hold
        return super().make(request, done)

    def scratch(self, count: int) -> int:
        if self.folder is None:
            return 0
        pipeline = self.unguided.pipeline
        latents = self.recipe.pool.codec == "latents"
        shape = latent_shape(pipeline) if latents else None
        return count * held_bytes(pipeline.image_shape, shape)

    def stepped(self, step: int, upcoming: object) -> None:
        """Forgets what was held at this step or behind it, which is of another course of the
        training.
        """
        if not self._trained:
            self._remove(lambda held: held >= step)
            self._trained = True

    def checkpointed(self, step: int, *, pending: bool) -> None:
        """Forgets the samples of the rounds that the checkpoint holds, which are in the pool for
        good.
        """
        self._remove(lambda held: held < step or (held == step and not pending))

    def _remove(self, gone: Callable[[int], bool]) -> None:
        if self.folder is not None:
            for step, path in numbered(self.folder, STEP).items():
                if gone(step):
                    shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # not there, or of use still
                self.folder.rmdir()

    def _later(self, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        oversample, initial = self.recipe.practice.oversample, self.initial_samples
        first, last = (
            initial + int(oversample * (size - initial))
            for size in (request.start, request.start + request.count)
        )
        if last - first > LAST:
            raise InputError(
                f"oversample = {oversample:g}: {last - first} candidates in a round; expected at "
                f"most {LAST}"
            )
        place = self._place(request)
        if place is not None and self.ranks.first:
            _remove_others(place.parent, self.ranks)
        held = HeldSamples(place)
        try:
            ids = self._ids(request, first)
            best = self._chosen(request, first, last - first, ids, held)
            yield from self._dealt(request, ids, best.numbers(), held)
        finally:
            held.close()

    def _place(self, request: RoundRequest) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / STEP.format(request.learner_step) / rank_folder_name(self.ranks)

    def _ids(self, request: RoundRequest, first: int) -> Ids:
        """Returns the ids of a round's candidates by their numbers."""
        counts = self.unguided.labels.counts
        if counts is None:
            return lambda numbers: first + numbers
        total, size = int(counts.sum()), request.count
        return lambda numbers: request.start + numbers % size + numbers // size * total

    def _best(self, request: RoundRequest) -> Best:
        """Returns the choice of a round's samples."""
        labels = self.unguided.labels
        if labels.counts is None:
            within = self.recipe.practice.prune_within == "class"
            return Best(request.count, labels.classes if within else 1)
        quotas = labels.between(request.start, request.count).bincount(minlength=labels.classes)
        return Best(request.count, labels.classes, quotas)

    def _groups(self, ids: Tensor) -> Tensor:
        """Returns (n,) int64: within which the highest entropies of the candidates ``ids`` are
        kept.
        """
        return self.unguided.labels.of(ids) * (self.recipe.practice.prune_within == "class")

    def _chosen(
        self, request: RoundRequest, first: int, count: int, ids: Ids, held: HeldSamples
    ) -> Best:
        """Returns the best of a round's ``count`` candidates; this rank's are held."""
        ranks, batch, turn = self.ranks, self.unguided.batch, request.turn
        best = self._best(request)
        span = ranks.size * batch
        turns = -(-count // span)
        number = self._resumed(request, first, count, ids, held, best)
        saved = self.clock()
        made = self._candidates(request, ids, count, done=min(number * batch, count))
        while number < turns:
            numbers = torch.arange(number * span, min((number + 1) * span, count))
            mine = ranks.indices(len(numbers), batch, turn=turn)
            candidates = next(made) if len(mine) else None
            scores = torch.empty(0) if candidates is None else candidates.entropy
            scores = ranks.gather(scores, len(numbers), batch, turn=turn)
            out = best.add(scores, self._groups(ids(numbers)), numbers)
            held.drop(out)
            if candidates is not None:
                kept = ~torch.isin(numbers[mine], torch.tensor(out, dtype=torch.int64))
                rows = torch.nonzero(kept).flatten()
                held.about["parts"] = [
                    (str(part.dtype).removeprefix("torch."), list(part.shape[1:]))
                    for part in _parts(candidates)
                ]
                held.put(
                    numbers[mine][rows].tolist(),
                    scores[mine][rows].tolist(),
                    _records(candidates.take(rows.to(candidates.images.device))),
                )
            number += 1
            if ranks.broadcast_object(number == turns or self.clock() - saved >= SAVED_SECONDS):
                held.about["cost"] = self.cost.state_dict()
                held.save(number)
                saved = self.clock()
        return best

    def _candidates(
        self, request: RoundRequest, ids: Ids, count: int, *, done: int
    ) -> Iterator[SampleBatch]:
        """Yields this rank's batches of candidates, each whole: where memory ran out, samples come
        in smaller parts.
        """
        ranks, batch, turn = self.ranks, self.unguided.batch, request.turn
        done = min(done, ranks.share(count, batch, turn=turn))
        scale = self.cfg_scale(request.number)
        parts = self.unguided.stream(
            0, count, self.cost, cfg_scale=scale, turn=turn, done=done, ids=ids
        )
        for indices in ranks.batches(count, batch, turn=turn, done=done):
            made = [self._scored(next(parts), request)]
            while sum(map(len, made)) < len(indices):
                made.append(self._scored(next(parts), request))
            yield made[0] if len(made) == 1 else joined(made)

    def _scored(self, batch: SampleBatch, request: RoundRequest) -> SampleBatch:
        """Returns the kept parts of a batch, with its entropy."""
        batch = self._judged(batch, request)
        keeps = self.recipe.pool.codec == "latents"
        return batch if keeps else replace(batch, latents=None)

    def _resumed(
        self,
        request: RoundRequest,
        first: int,
        count: int,
        ids: Ids,
        held: HeldSamples,
        best: Best,
    ) -> int:
        """Returns after how many turns a round goes on that was cut short; what was kept by then is
        in ``held`` and ``best``. 0: it begins anew.
        """
        ranks, practice = self.ranks, self.recipe.practice
        asked = {**asdict(replace(request, per_class=None)), "first": first, "candidates": count}
        this = {
            **asked,
            "ranks": ranks.size,
            "batch": self.unguided.batch,
            "cfg_scale": self.cfg_scale(request.number),
            "within": practice.prune_within,
            "seed": self.recipe.seed,
        }
        saved = set.intersection(*map(set, ranks.all_gather_object(held.turns())))
        if saved:
            turn, numbers, scores, failure = max(saved), None, None, None
            try:
                numbers, scores = held.load(turn)
                if held.about.get("round") != this:
                    raise InputError(f"{str(held.folder)!r} is of another round")
            except InputError as error:
                failure = str(error)
            failures = [said for said in ranks.all_gather_object(failure) if said]
            if not failures and numbers is not None and scores is not None:
                self.cost.load_state_dict(held.about["cost"])
                numbers, scores = self._together(numbers, scores)
                best.add(scores, self._groups(ids(numbers)), numbers)
                return turn
            if ranks.first:
                log.warning(
                    "the candidates of round %d are made again: %s", request.number, failures[0]
                )
        held.clear()
        held.about = {"round": this}
        return 0

    def _together(self, numbers: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers what all ranks hold: numbers (n,) int64 and scores (n,) float32."""
        counts = self.ranks.all_gather_object(len(numbers))
        packed = torch.zeros(max(counts), 2, dtype=torch.int64)
        packed[: len(numbers), 0] = numbers
        packed[: len(numbers), 1] = scores.view(torch.int32)
        found = self.ranks.all_gather(packed)
        every = torch.cat([part[:n] for part, n in zip(found, counts, strict=True)])
        return every[:, 0], every[:, 1].to(torch.int32).view(torch.float32)

    def _dealt(
        self, request: RoundRequest, ids: Ids, numbers: Tensor, held: HeldSamples
    ) -> Iterator[SampleBatch]:
        """Yields this rank's samples of a round, which the ranks that hold them send it, a batch at
        a time.
        """
        ranks, batch, turn = self.ranks, self.unguided.batch, request.turn
        makers = (turn + numbers // batch) % ranks.size
        owners = (turn + torch.arange(len(numbers)) // batch) % ranks.size
        span = ranks.size * batch
        for start in range(0, len(numbers), span):
            rows = slice(start, start + span)
            made, due = makers[rows], owners[rows]
            sent = [
                numbers[rows][(made == ranks.rank) & (due == rank)] for rank in range(ranks.size)
            ]
            records = held.records(torch.cat(sent).tolist())
            held.drop(torch.cat(sent).tolist())
            mine = numbers[rows][due == ranks.rank]
            if not ranks.alone:
                records = self._sent(
                    records, [len(each) for each in sent], made[due == ranks.rank], held.width
                )
            if len(mine):
                yield self._batch(request, ids(mine), records, held.about["parts"])

    def _sent(self, records: Tensor, sent: list[int], origins: Tensor, width: int) -> Tensor:
        """Returns (n, width) records that ranks send this one, from ``origins`` (n,); this one
        sends ``records``, ``sent[r]`` of them to rank r.
        """
        ranks = self.ranks
        ranks.ready()
        counts = torch.bincount(origins, minlength=ranks.size).tolist()
        sizes = [[width * count for count in each] for each in (sent, counts)]
        received = ranks.control.all_to_all(records.flatten(), *sizes).view(len(origins), width)
        ordered = torch.empty_like(received)
        ordered[origins.argsort(stable=True)] = received
        return ordered

    def _batch(
        self, request: RoundRequest, ids: Tensor, records: Tensor, parts: list[Any]
    ) -> SampleBatch:
        """Returns the samples ``ids`` (n,) of their records, on the CPU."""
        columns = []
        start = 0
        for name, shape in parts:
            dtype = getattr(torch, name)
            size = math.prod(shape) * dtype.itemsize
            column = records[:, start : start + size].contiguous().view(dtype)
            columns.append(column.view(len(ids), *shape))
            start += size
        entropy, images, *latents = columns
        return SampleBatch(
            images=images,
            labels=self.unguided.labels.of(ids),
            sample_ids=ids,
            entropy=entropy,
            learner_step=request.learner_step,
            latents=latents[0] if latents else None,
        )


def _remove_others(folder: Path, ranks: Ranks) -> None:
    """Removes what other numbers of ranks have held of a round, which these make again."""
    for path, size in rank_folders(folder).items():
        if size != ranks.size:
            shutil.rmtree(path, ignore_errors=True)


def held_bytes(image: Sequence[int], latents: Sequence[int] | None) -> int:
    """Returns bytes of a sample while it is held: pixels, latents where the pool stores them,
    entropy.
    """
    return 4 + math.prod(image) + (0 if latents is None else 2 * math.prod(latents))


def _parts(batch: SampleBatch) -> list[Tensor]:
    parts = [batch.entropy, batch.images]
    return parts if batch.latents is None else [*parts, batch.latents]


def _records(batch: SampleBatch) -> Tensor:
    """Returns (n, width) uint8 on the CPU: all that is held of each sample of a batch."""
    columns = [
        part.cpu().contiguous().view(len(batch), math.prod(part.shape[1:]))
        for part in _parts(batch)
    ]
    return torch.cat([column.view(torch.uint8) for column in columns], 1)
