"""The state of a loop beside its learner and its samples, and the protocol of all that a checkpoint
keeps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from torch import Tensor

from dpfast.feed.loader import Loader


class Component(Protocol):
    """A part of a loop that keeps its own state: ``Loop.components`` names them all."""

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that what comes depends on: names with tensors, or with values that
        JSON can hold.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from where ``state_dict`` was taken."""
        ...


@dataclass
class LoopState:
    """The state of a loop in Algorithm 1.

    Attributes:
        round: The newest complete round, -1 before the initial samples, which are round 0.
        rounds: Samples of every complete round.
        pending: True where the next round is due, or being made.
        round_start: Samples in the pool before it, or before the newest one.
        moments: Steps after which samples were added.
        frozen: True in a branch, where no more are added.
        finished: True behind the last step.
        accuracy: Accuracy of the last evaluation, in [0, 1].
        per_class: (K,) float32 accuracies of the last evaluation, NaN for a class without images.
    """

    round: int = -1
    rounds: list[int] = field(default_factory=list)
    pending: bool = True
    round_start: int = 0
    moments: list[int] = field(default_factory=list)
    frozen: bool = False
    finished: bool = False
    accuracy: float | None = None
    per_class: Tensor | None = None

    @property
    def additions(self) -> int:
        """The number of complete rounds after the initial samples."""
        return max(self.round, 0)

    def state_dict(self) -> dict[str, Any]:
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return state | {"rounds": list(self.rounds), "moments": list(self.moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class LoopSeconds:
    """The seconds that a loop has spent, in all lives of a run that went on.

    training, evaluation: between the two brackets of ``of``; waiting: of training, for batches.
    """

    def __init__(self, loader: Loader) -> None:
        self.training = self.evaluation = 0.0
        self._loader = loader
        self._waited_before = 0.0

    @property
    def waiting(self) -> float:
        """The seconds that training has waited for batches."""
        return self._waited_before + self._loader.waited

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Adds the time within a ``with`` block to ``phase``, "training" or "evaluation"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, phase, getattr(self, phase) + time.perf_counter() - started)

    def state_dict(self) -> dict[str, Any]:
        return {"training": self.training, "evaluation": self.evaluation, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training = state["training"]
        self.evaluation = state["evaluation"]
        self._waited_before = state["waiting"] - self._loader.waited
