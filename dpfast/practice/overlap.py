"""Generation and training side by side: some ranks only make samples, the others train.

    generators  make the next round, batch by batch, guided by the learner that was published last
    trainers    run Algorithm 1; when samples are due they take that round over, and wait for what
                is missing of it

A learner is published when a round may be due within ``overlap_staleness`` optimiser steps, at an
evaluation or at the next step of ``add_at``, and again as soon as what it guides would be older
than that where the round may be due next: the generators then begin the round anew. So no sample is
older when it is added, its column ``learner_step`` says how old, and nothing depends on the clock:
a run gives the same bits again.

Weights go from the first trainer to the generators by a broadcast that the trainer does not wait
for, samples from the generators to the trainers that will hold them, batch by batch, when they are
due and both are ready. All of it goes through the hosts: on a GPU it would be a second communicator
beside the gradients' (``dpfast.parallel.groups``). Batches are those of the alternating schedule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.generate.criteria import Criterion
from dpfast.generate.from_recipe import latent_shape
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.learn.models import NewLearner, guiding
from dpfast.learn.precision import in_precision
from dpfast.parallel import Ranks
from dpfast.parallel.groups import Group
from dpfast.parallel.heartbeat import Heartbeat
from dpfast.pool.pool import SamplePool
from dpfast.practice.patience import next_chance
from dpfast.practice.stopping import Stop
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost
from dpfast.sources.deliberate_practice import DeliberatePracticeSource
from dpfast.sources.guided_methods import joined
from dpfast.sources.source import RoundRequest, Source
from dpfast.sources.unguided import UnguidedSamples

WEIGHTS = "weights/"  # of the learner, in the names of a checkpoint


@dataclass(frozen=True)
class OverlapGroups:
    """The messages between trainers and generators.

    generates: whether this process is a generator. publishing: carries weights, from the first
    trainer to all generators; everyone: samples, between any two processes. store: short messages,
    most of them of the first trainer.
    """

    trainers: Ranks
    generators: Ranks
    generates: bool
    publishing: Group
    everyone: Group
    heartbeat: Heartbeat
    store: Any

    @classmethod
    def of(cls, ranks: Ranks, count: int) -> OverlapGroups:
        """Makes the last ``count`` ranks generators. Collective: all ranks of the run call it."""
        trainers, generators, publishing = ranks.parted(count)
        return cls(
            trainers=trainers,
            generators=generators,
            generates=ranks.rank >= trainers.size,
            publishing=publishing,
            everyone=ranks.control,
            heartbeat=ranks.heartbeat,
            store=ranks.store,
        )

    def generator_of(self, batch: int) -> int:
        """Returns the process that makes batch ``batch`` of a round."""
        return self.trainers.size + batch % self.generators.size

    def owner_of(self, batch: int, turn: int) -> int:
        """Returns the process that will hold batch ``batch`` of a round whose first one ``turn``
        holds.
        """
        return (turn + batch) % self.trainers.size

    def tell(self, key: str, value: Any = None) -> None:
        """Says something to the other processes, which JSON can hold."""
        self.store.set(f"overlap/{key}", json.dumps(value))

    def told(self, key: str) -> bool:
        """Returns True if some process has said ``key``."""
        return bool(self.store.check([f"overlap/{key}"]))

    def any_told(self, keys: Sequence[str]) -> bool:
        """Returns True if some process has said one of ``keys``."""
        return any(map(self.told, keys))

    def said(self, key: str, process: int) -> Any:
        """Waits for what ``process`` says, and returns it. Raises ``RankError`` when it is dead."""
        self.heartbeat.wait(lambda: self.told(key), lambda: [process])
        return json.loads(self.store.get(f"overlap/{key}"))

    def meet(self, key: str, process: int) -> None:
        """Waits until ``process``, which says the same, and this one are ready to pass on what
        ``key`` names.
        """
        self.tell(f"{key}/{int(self.generates)}")
        self.said(f"{key}/{int(not self.generates)}", process)
        self.store.delete_key(f"overlap/{key}/{int(not self.generates)}")


class OverlappedSource(Source):
    """The source "dp" of a trainer: its rounds come from the generators, to whom it publishes the
    learner.
    """

    def __init__(
        self, source: DeliberatePracticeSource, guides: nn.Module, groups: OverlapGroups
    ) -> None:
        super().__init__(source.initial_samples)
        self.source = source
        self.guides = guides
        self.groups = groups
        self.cost = source.cost
        self.yardstick = source.yardstick
        self.moments = source.moments
        pipeline = source.pipeline
        self._images = pipeline.image_shape
        self._latents: tuple[int, ...] | None = None
        if source.recipe.pool.codec == "latents":
            self._latents = latent_shape(pipeline)
        self.job: RoundRequest | None = None  # what the generators are at
        self.snapshot: dict[str, Tensor] = {}  # the weights that guide it
        self._published = -1
        self._works: list[Any] = []

    def available(self, pool_size: int) -> int:
        return self.source.available(pool_size)

    def omega(self, number: int) -> float:
        return self.source.omega(number)

    def omega_of(self, number: int, labels: Tensor) -> float | Tensor:
        return self.source.omega_of(number, labels)

    def cfg_scale(self, number: int) -> float:
        return self.source.cfg_scale(number)

    def steps(self, number: int) -> int:
        return self.source.steps(number)

    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        if self.job is None or (self.job.number, self.job.count) != (request.number, request.count):
            self._publish(request)
        assert self.job is not None
        groups = self.groups
        size = self.source.unguided.batch
        step = self.job.learner_step
        if groups.trainers.first:
            groups.tell(f"deliver/{self._published}")
        for indices in groups.trainers.batches(request.count, size, turn=request.turn):
            number = indices.start // size
            process = groups.generator_of(number)
            groups.meet(f"batch/{self._published}/{number}", process)
            yield replace(self._received(process, len(indices)), learner_step=step)
        if not groups.trainers.first:
            return
        spent = []
        for rank in range(groups.generators.size):
            key = f"spent/{self._published}/{rank}"
            spent.append(groups.said(key, groups.generators.process(rank)))
        self.cost.take_all(spent)

    def release(self) -> None:
        """Does nothing: the memory of the generators is their own."""

    def _received(self, process: int, count: int) -> SampleBatch:
        device = self.source.pipeline.device
        group = self.groups.everyone
        columns = torch.empty(2, count, dtype=torch.int64)
        entropy = torch.empty(count)
        images = torch.empty(count, *self._images, dtype=torch.uint8)
        latents = torch.empty(count, *self._latents, dtype=torch.float16) if self._latents else None
        for part in (columns, entropy, images, *([] if latents is None else [latents])):
            group.receive(part, process)
        labels, ids, entropy, images = (part.to(device) for part in (*columns, entropy, images))
        latents = None if latents is None else latents.to(device)
        return SampleBatch(
            images=images, labels=labels, sample_ids=ids, entropy=entropy, latents=latents
        )

    def added(self, upcoming: RoundRequest | None) -> None:
        self.job = None
        if upcoming is not None and self._within_reach(upcoming.learner_step, after=1):
            self._publish(upcoming)

    def stepped(self, step: int, upcoming: Callable[[], RoundRequest | None]) -> None:
        if self._within_reach(step):
            request = upcoming()
            if request is None:
                self.job = None
            else:
                self._publish(request)

    def _within_reach(self, step: int, after: int = 0) -> bool:
        """Returns True if the learner of this moment would guide a round that may be due from
        ``after`` steps on, and the one that was published may not.
        """
        recipe = self.source.recipe
        oldest = recipe.practice.overlap_staleness
        interval = recipe.practice.interval(recipe.learner.batch_size)
        due = next_chance(step + after, interval, self.moments)  # before it none can be added
        if due is None or due - step > oldest:  # what it guided would be thrown away
            return False
        return self.job is None or due - self.job.learner_step > oldest

    def close(self) -> None:
        if self.groups.trainers.first:
            self.groups.tell("end")

    def _publish(self, job: RoundRequest, weights: dict[str, Tensor] | None = None) -> None:
        """Lets the generators begin a round, guided by ``weights`` or the learner of this
        moment.
        """
        self.job = job
        self._published += 1
        if not self.groups.trainers.first:
            return
        if weights is None:
            weights = {
                name: v.detach().to("cpu", copy=True)
                for name, v in self.guides.state_dict().items()
            }
        self.snapshot = weights
        for work in self._works:
            work.wait()
        self.groups.tell(f"job/{self._published}", job.to_dict())
        self._works = [
            self.groups.publishing.broadcast(value, 0, wait=False) for value in weights.values()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns the cost, and of a round on its way what was asked for and the weights that guide
        it.
        """
        state: dict[str, Any] = {**super().state_dict(), "job": None}
        if self.job is not None:
            state["job"] = self.job.to_dict()
            state |= {f"{WEIGHTS}{name}": value for name, value in self.snapshot.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on, and lets the generators begin again what they were at."""
        super().load_state_dict(state)
        if state["job"] is not None:
            weights = {name: state[f"{WEIGHTS}{name}"] for name in self.guides.state_dict()}
            self._publish(RoundRequest.from_dict(state["job"]), weights)


class GeneratorRank:
    """Makes what ``OverlappedSource`` asks for, until it says that the run ends."""

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Pipeline | OwnPipeline,
        groups: OverlapGroups,
        stop: Stop,
        new_learner: NewLearner,
        *,
        criterion: Criterion | None = None,
    ) -> None:
        self.recipe = recipe
        self.groups = groups
        self.stop = stop
        guide = new_learner().eval().requires_grad_(False)
        other = new_learner().eval().requires_grad_(False)
        guide, other = (
            in_precision(m, recipe.learner.precision, pipeline.device) for m in (guide, other)
        )
        self.guides = guiding(recipe.guidance.criterion, guide, other)
        unguided = UnguidedSamples(recipe, pipeline, groups.generators)
        self.source = DeliberatePracticeSource(
            recipe,
            pipeline,
            unguided,
            guide,
            guides=self.guides,
            pool=SamplePool,
            criterion=criterion,
        )
        self._taken = -1

    def serve(self) -> None:
        """Raises ``Stopped`` as soon as it is requested, ``RankError`` when a trainer that it waits
        for is dead.
        """
        with self.stop.at_once():
            self._serve()

    def _serve(self) -> None:
        job: RoundRequest | None = None
        made: list[SampleBatch] = []
        batches: Iterator[SampleBatch] = iter(())
        groups, rest = self.groups, False
        while True:
            if groups.told(f"job/{self._taken + 1}"):
                job = self._take()
                made = []
                batches = self._batches(job)
                rest = True
            elif groups.told("end"):
                return
            elif job is not None and groups.told(f"deliver/{self._taken}"):
                self._deliver(job, made, batches)
                job, rest = None, False
            elif rest:
                batch = next(batches, None)
                rest = batch is not None
                if batch is not None:
                    made.append(batch)
            else:
                news = [
                    f"job/{self._taken + 1}",
                    "end",
                    *([] if job is None else [f"deliver/{self._taken}"]),
                ]
                groups.heartbeat.wait(partial(groups.any_told, news), lambda: [0])

    def _batches(self, job: RoundRequest) -> Iterator[SampleBatch]:
        """Yields this generator's batches of a round, each whole: where memory ran out, samples
        come in smaller parts.
        """
        parts = self.source.make(replace(job, turn=0))
        held = None
        for indices in self.groups.generators.batches(job.count, self.recipe.generator.batch_size):
            while held is None or len(held) < len(indices):
                part = _on_host(next(parts))
                held = part if held is None else joined([held, part])
            self.groups.heartbeat.beat()
            yield held.take(slice(None, len(indices)))
            held = held.take(slice(len(indices), None)) if len(held) > len(indices) else None

    def _take(self) -> RoundRequest:
        """Returns the next job; its weights are in place."""
        self._taken += 1
        for value in self.guides.state_dict().values():
            received = torch.empty_like(value, device="cpu")
            self.groups.publishing.broadcast(received, 0)
            value.copy_(received)
        return RoundRequest.from_dict(self.groups.said(f"job/{self._taken}", 0))

    def _deliver(
        self, job: RoundRequest, made: list[SampleBatch], batches: Iterator[SampleBatch]
    ) -> None:
        """Sends the batches of a round, those that are missing as soon as they are made."""
        groups = self.groups
        size = self.recipe.generator.batch_size
        latents = self.recipe.pool.codec == "latents"
        for number, indices in enumerate(groups.generators.batches(job.count, size)):
            batch = made[number] if number < len(made) else next(batches)
            owner = groups.owner_of(indices.start // size, job.turn)
            groups.meet(f"batch/{self._taken}/{indices.start // size}", owner)
            columns = torch.stack([batch.labels, batch.sample_ids])
            parts = [columns, batch.entropy, batch.images, *([batch.latents] if latents else [])]
            for part in parts:
                assert part is not None
                groups.everyone.send(part, owner)
        groups.tell(f"spent/{self._taken}/{groups.generators.rank}", self.source.cost.state_dict())
        self.source.cost.load_state_dict(Cost().state_dict())
        # the next round may have other steps than this one, the unguided of round 0
        self.source.release()


def _on_host(batch: SampleBatch) -> SampleBatch:
    latents = None if batch.latents is None else batch.latents.cpu()
    images, labels, ids, entropy = (
        v.cpu() for v in (batch.images, batch.labels, batch.sample_ids, batch.entropy)
    )
    return replace(
        batch, images=images, labels=labels, sample_ids=ids, entropy=entropy, latents=latents
    )
