"""When to ask for more samples: patience with the validation accuracy (Algorithm 1 and section C.2 of the paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Patience:
    """Counts evaluations without a new best accuracy.

    The paper lets T_max grow with the data set and does not state the rule. "pool": T_max = ceil(initial x pool / N),
    which keeps the number of passes over the pool before a trigger constant; "fixed": T_max = initial.
    """

    initial: int
    initial_samples: int
    growth: str = "pool"
    best: float = -math.inf
    waited: int = 0

    def limit(self, pool_size: int) -> int:
        """T_max for a pool of ``pool_size`` samples, in evaluations."""
        if self.growth == "fixed":
            return self.initial
        return math.ceil(self.initial * pool_size / self.initial_samples)

    def update(self, accuracy: float, pool_size: int) -> bool:
        """Takes one evaluation; True when samples are due. The caller resets with ``reset`` after adding them."""
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
        else:
            self.waited += 1
        return self.waited >= self.limit(pool_size)

    def reset(self) -> None:
        self.waited = 0
