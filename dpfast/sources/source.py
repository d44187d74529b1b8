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
    """The request of a round of samples from a source.

    Attributes:
        number: Number of the round, 0 for the initial samples.
        start: Samples in the pool before it.
        count: Samples of the round, of all ranks.
        learner_step: Optimiser steps of the learner at this moment.
        per_class: (K,) validation accuracies of the learner at this moment; None in round 0.
        turn: Rank that makes the first batch.
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

    Attributes:
        recipe: The recipe as it is run.
        pipeline: Generator of the images.
        learner: Live weights that guide, from images (B, C, H, W) in [-1, 1] to logits (B, K).
        pool: Function that gives this rank's part of the pool.
        unguided: Unguided samples by id, shared with other sources.
        ranks: Processes that make a round together.
        moments: Steps after which the source "dp" has added, where it has run before, or the
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
    """Makes the samples of a run. ``available`` and ``make`` are a source's own.

    All other methods have defaults. ``examples/own_source.py`` is a source of one's own.

    Args:
        initial_samples: Samples of round 0.

    Attributes:
        name: Name of the source in results and files.
        moments: Steps after which the learner is evaluated and rounds are due, in place of
            patience; None: by patience.
        streams: True if ``make`` can go on in the middle of the round that it was asked for last.
        yardstick: Unguided samples with whose entropy that of a round is compared, or None.
        initial_samples: Samples of round 0.
        cost: Cost of everything made so far, to which ``make`` adds.
    """

    name = ""
    moments: Collection[int] | None = None
    streams = False
    yardstick: Yardstick | None = None

    def __init__(self, initial_samples: int) -> None:
        self.initial_samples = initial_samples
        self.cost = Cost()

    def begin(self, loop: LoopView) -> None:  # noqa: B027
        """Takes the parts of its loop before anything is asked for.

        A loop calls this for sources of the caller's own alone.

        Args:
            loop: Recipe, generator, live learner and more.
        """

    @abc.abstractmethod
    def available(self, pool_size: int) -> int:
        """Returns the number of samples that the next round would bring; 0: none.

        Args:
            pool_size: Samples in the pool.
        """

    @abc.abstractmethod
    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        """Yields this rank's samples of a round, in batches.

        The learner is in eval mode meanwhile.

        Args:
            request: The round that is asked for.
            done: Samples of this rank's part that exist already and are left out.
        """

    def omega(self, number: int) -> float:
        """Returns the strength of guidance in round ``number``, which is kept with its samples."""
        return 0.0

    def omega_of(self, number: int, labels: Tensor) -> float | Tensor:
        """Returns the strength of guidance in round ``number`` for samples with these labels.

        Args:
            number: Number of the round.
            labels: (n,) int64 class ids.

        Returns:
            A number, or (n,) float32 where classes differ.
        """
        return self.omega(number)

    def cfg_scale(self, number: int) -> float:
        """Returns the scale of classifier-free guidance in round ``number``; 1: none."""
        return 1.0

    def steps(self, number: int) -> int:
        """Returns the solver steps that a sample of round ``number`` takes."""
        return 1

    def drawn(self, number: int) -> tuple[int, float] | None:
        """Returns the group of first samples from which batches are drawn after round ``number``.

        Returns:
            The number of the pool's first samples in that group, and the group's share of a
            training batch. None: all samples are drawn alike.
        """
        return None

    def release(self) -> None:  # noqa: B027
        """Gives back the memory that a round leaves behind (``GuidedSampler.release``)."""

    def added(self, upcoming: RoundRequest | None) -> None:  # noqa: B027
        """Hears that a round has been added.

        Args:
            upcoming: The next round, as it would be asked for now; None where no more are added.
        """

    def stepped(self, step: int, upcoming: Callable[[], RoundRequest | None]) -> None:  # noqa: B027
        """Hears that ``step`` optimiser steps have been taken.

        Args:
            step: Optimiser steps taken.
            upcoming: Function that gives the next round, as it would be asked for now.
        """

    def scratch(self, count: int) -> int:
        """Returns bytes of the disk that a round of ``count`` samples takes while it is made.

        They are those of all ranks together.
        """
        return 0

    def checkpointed(self, step: int, *, pending: bool) -> None:  # noqa: B027
        """Hears, on the rank that writes, that a checkpoint is on the disk.

        Args:
            step: Optimiser steps of the checkpoint.
            pending: True if it leads into the round after this step, else it holds that round.
        """

    def close(self) -> None:  # noqa: B027
        """Hears that the loop is left, for whatever reason."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a checkpoint keeps: names with tensors or values for JSON."""
        return {"cost": self.cost.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken."""
        self.cost.load_state_dict(state["cost"])
