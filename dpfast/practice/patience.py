"""When to ask for more samples: patience with the validation accuracy (Algorithm 1 and section C.2 of the paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Patience:
    """Counts evaluations without a new best accuracy.

    The paper lets T_max grow with the data set and does not state the rule. Two rules fit its figures. "pool":
    T_max = ceil(initial x pool / N) keeps the number of passes over the pool before a trigger constant; "round":
    T_max = initial + rounds so far. "fixed": T_max = initial.
    """

    initial: int
    initial_samples: int
    growth: str = "pool"
    best: float = -math.inf
    waited: int = 0
    rounds: int = 0

    def limit(self, pool_size: int) -> int:
        """T_max for a pool of ``pool_size`` samples, in evaluations."""
        if self.growth == "pool":
            return math.ceil(self.initial * pool_size / self.initial_samples)
        return self.initial + (self.rounds if self.growth == "round" else 0)

    def update(self, accuracy: float, pool_size: int) -> bool:
        """Takes one evaluation; True when samples are due. The caller says ``added`` after adding them."""
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
        else:
            self.waited += 1
        return self.waited >= self.limit(pool_size)

    def added(self) -> None:
        """A round of samples has been added: the count begins anew."""
        self.waited = 0
        self.rounds += 1

    def state(self) -> dict[str, Any]:
        # JSON knows no infinity
        return {"best": None if self.best == -math.inf else self.best, "waited": self.waited, "rounds": self.rounds}

    def restore(self, state: dict[str, Any]) -> None:
        self.best = -math.inf if state["best"] is None else state["best"]
        self.waited, self.rounds = state["waited"], state["rounds"]
