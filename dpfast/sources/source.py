"""The protocol of a source, which is asked for the samples of each round."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.protocol import OwnPipeline
from dpfast.parallel import Ranks
from dpfast.pool.pool import SamplePool
from dpfast.samples import SampleBatch
from dpfast.sources.costs import Cost
from dpfast.sources.unguided import UnguidedSamples
from dpfast.sources.yardstick import Yardstick


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """The request of a round from a source. number: 0 for the initial samples; start: the pool's
    size before;
    count: how many.

    per_class: (K,) validation accuracies of the learner at this moment; None in round 0. turn: the
    first batch's rank.
    """

    number: int
    start: int
    count: int
    learner_step: int = 0
    per_class: Tensor | None = None
    turn: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the request for JSON, which knows no NaN: None for a class without images."""
        known = self.per_class
        plain = None if known is None else [None if v != v else v for v in known.tolist()]
        return {**dataclasses.asdict(self), "per_class": plain}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> RoundRequest:
        """Returns the request that ``to_dict`` gave."""
        known = plain["per_class"]
        if known is not None:
            known = torch.tensor([float("nan") if v is None else v for v in known])
        return cls(**{**plain, "per_class": known})


@dataclass(frozen=True, kw_only=True)
class LoopView:
    """The parts of a loop that its source may use.

    recipe: as it is run. pipeline: what makes images. learner: live, the weights that guide, from
    images (B, C, H, W) in [-1, 1] to logits (B, K). pool: gives this rank's part of the pool.
    unguided: samples by id, shared with other sources. ranks: those that make a round together.
    moments: the steps after which the source "dp" has added, where it has run before, or the
    recipe's ``add_at``; None: neither.
    """

    recipe: Recipe
    pipeline: Pipeline | OwnPipeline
    learner: nn.Module
    pool: Callable[[], SamplePool]
    unguided: UnguidedSamples
    ranks: Ranks
    moments: Collection[int] | None


class Source(abc.ABC):
    """Makes the samples of a run. ``available`` and ``make`` are a source's own; the rest has
    defaults.

    name: what results and files call it. initial_samples: of round 0. moments: the steps after
    which the learner is evaluated and rounds are due, in place of patience; None: by patience.
    streams: whether ``make`` can go on in the middle of the round that it was asked for last. cost:
    of everything made so far, to which ``make`` adds. yardstick: what a round's entropy is compared
    with.
    """

    name = ""
    moments: Collection[int] | None = None
    streams = False
    yardstick: Yardstick | None = None

    def __init__(self, initial_samples: int) -> None:
        self.initial_samples = initial_samples
        self.cost = Cost()

    def begin(self, loop: LoopView) -> None:  # noqa: B027
        """Hears of its loop, before anything is asked for; of a source of the caller's own."""

    @abc.abstractmethod
    def available(self, pool_size: int) -> int:
        """Returns the number of samples that the next round would bring; 0: none."""

    @abc.abstractmethod
    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        """Returns this rank's samples of a round, without its first ``done``. The learner is in
        eval mode meanwhile.
        """

    def omega(self, number: int) -> float:
        """Returns the strength of the guidance in round ``number``, which is kept with its
        samples.
        """
        return 0.0

    def omega_of(self, number: int, labels: Tensor) -> float | Tensor:
        """Returns the same for each of its samples with these labels, (n,) int64: a number, or (n,)
        float32 where classes differ.
        """
        return self.omega(number)

    def cfg_scale(self, number: int) -> float:
        """Returns the scale of classifier-free guidance in round ``number``; 1: none."""
        return 1.0

    def steps(self, number: int) -> int:
        """Returns the solver steps that a sample of round ``number`` takes."""
        return 1

    def drawn(self, number: int) -> tuple[int, float] | None:
        """Returns the number of the pool's first samples that are a group of their own after round
        ``number``, and their share of a training batch; None: all samples are drawn alike.
        """
        return None

    def release(self) -> None:  # noqa: B027
        """Gives back the memory that the making of a round leaves behind
        (``GuidedSampler.release``).
        """

    def added(self, upcoming: RoundRequest | None) -> None:  # noqa: B027
        """Hears that a round has been added; ``upcoming``: the next one, as it would be asked for
        now, or None where no more are added.
        """

    def stepped(self, step: int, upcoming: Callable[[], RoundRequest | None]) -> None:  # noqa: B027
        """Hears that ``step`` optimiser steps have been taken; ``upcoming`` gives the next round as
        it would be asked for now.
        """

    def scratch(self, count: int) -> int:
        """Returns bytes of the disk, of all ranks, that a round of ``count`` samples takes while it
        is made.
        """
        return 0

    def checkpointed(self, step: int, *, pending: bool) -> None:  # noqa: B027
        """Hears, on the rank that writes, that a checkpoint of ``step`` optimiser steps is on the
        disk; ``pending``: it leads into the round after this step, else it holds that round.
        """

    def close(self) -> None:  # noqa: B027
        """Hears that the loop is left, for whatever reason."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a checkpoint keeps of the source: names with tensors or values for
        JSON.
        """
        return {"cost": self.cost.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken."""
        self.cost.load_state_dict(state["cost"])
