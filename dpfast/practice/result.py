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
    """The outcome of one source, with the pool it trained on and its accuracies.

    Accuracies are those of the ``evaluate_with`` weights. Seconds are those of all lives of a
    resumed run.

    Attributes:
        source: Name of the source.
        pool: Samples that the source has made.
        learner: Trained classifier, images (B, C, H, W) in [-1, 1] to logits (B, K).
        validation: Measures on the real images that drive patience.
        test: Measures on the held-out real images.
        iterations: Optimiser steps taken.
        additions: Rounds after the initial samples.
        initial_cost: Cost of the samples before training.
        cost: Cost of all samples.
        training_seconds: Seconds of training.
        evaluation_seconds: Seconds of evaluation.
        loader_wait: Time spent waiting for batches over the time of the learner's steps.
        sets: Measures on the recipe's further evaluation sets.
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
