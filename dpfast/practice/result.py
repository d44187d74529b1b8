"""The result of a finished loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dpfast.evaluate.measures import Evaluation
from dpfast.evaluate.sets import Row
from dpfast.pool.protocol import Pool
from dpfast.sources.costs import Cost


@dataclass(frozen=True)
class Result:
    """One source's outcome: the pool it trained on and its accuracy on the two real sets
    (``evaluate_with`` weights).

    cost: of all samples; initial_cost: of those before training. Seconds are those of all lives of
    a resumed run.
    loader_wait: time spent waiting for batches over the time of the learner's steps. sets: the
    recipe's further ones.
    """

    source: str
    pool: Pool
    learner: nn.Module
    validation: Evaluation
    test: Evaluation
    iterations: int
    additions: int
    initial_cost: Cost
    cost: Cost
    training_seconds: float
    evaluation_seconds: float
    loader_wait: float
    sets: tuple[Row, ...] = ()

    @property
    def generation_seconds(self) -> float:
        """The seconds in which samples were made."""
        return self.cost.seconds
