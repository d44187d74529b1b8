"""The moments at which to ask for more samples: patience with the validation accuracy (Algorithm 1
and section C.2 of the paper), or steps that are known before.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

COVERED = 0.25  # of the pool at least is drawn between two additions by the rule "coverage"


@dataclass
class Patience:
    """Counts evaluations without a new best accuracy.

    The paper lets T_max grow with the data set, so that samples are seen often enough before more
    are added, and does not state the rule. With an evaluation for every N samples that are drawn
    (N: the initial ones):

        coverage    max(initial, ceil(pool / 4 N)): between two additions at least a quarter of the
                    pool is drawn
        pool        ceil(initial x pool / N): the number of passes over the pool stays that of the
                    start
        round       initial + rounds so far
        fixed       initial

    Of these the last row of the paper's Table 4 allows the first and the last
    (docs/background/patience.md).
    """

    initial: int
    initial_samples: int
    growth: str = "coverage"
    best: float = -math.inf
    waited: int = 0
    rounds: int = 0

    def limit(self, pool_size: int) -> int:
        """Returns T_max for a pool of ``pool_size`` samples, in evaluations."""
        times = pool_size / self.initial_samples
        if self.growth == "coverage":
            return max(self.initial, math.ceil(COVERED * times))
        if self.growth == "pool":
            return math.ceil(self.initial * pool_size / self.initial_samples)
        return self.initial + (self.rounds if self.growth == "round" else 0)

    def update(self, accuracy: float, pool_size: int) -> bool:
        """Takes one evaluation; True when samples are due. The caller says ``added`` after adding
        them.
        """
        if accuracy > self.best:
            self.best, self.waited = accuracy, 0
        else:
            self.waited += 1
        return self.waited >= self.limit(pool_size)

    def added(self) -> None:
        """Begins the count anew, after a round of samples has been added."""
        self.waited = 0
        self.rounds += 1

    def state_dict(self) -> dict[str, Any]:
        # JSON knows no infinity
        return {
            "best": None if self.best == -math.inf else self.best,
            "waited": self.waited,
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = -math.inf if state["best"] is None else state["best"]
        self.waited = state["waited"]
        self.rounds = state["rounds"]


def next_chance(step: int, interval: int, moments: Collection[int] | None) -> int | None:
    """Returns the first step from ``step`` on after which a round may be due: of the ``moments``,
    where they are known, or the next evaluation; None where no moment is left.

    interval: steps between two evaluations.
    """
    if moments is None:
        return -(-step // interval) * interval
    return min((moment for moment in moments if moment >= step), default=None)
