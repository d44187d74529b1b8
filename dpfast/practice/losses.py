"""The training loss: its mean between evaluations, and the first step at which it is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpfast.feed.loader import Loader
from dpfast.parallel import ALONE, Ranks


class Losses:
    """Takes every step's loss and reads none of them, so that a GPU's queue stays full.

    ``anchor`` remembers where the loader stands after ``step`` steps; the samples of a bad step
    are drawn again from there.
    """

    def __init__(self, loader: Loader, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.loader, self.ranks = loader, ranks
        self.total = torch.zeros((), device=device)  # since the last ``mean``
        self._begun = False  # whether there was a step since then, on any rank: on all alike
        # the first step without a finite loss; 0: none
        self._bad = torch.zeros((), dtype=torch.int64, device=device)
        self.anchor(0)

    def anchor(self, step: int) -> None:
        """Says that all steps up to this one were good, and that the loader stands behind it."""
        self.step = step
        self._position = self.loader.state_dict()

    def add(self, loss: Tensor, step: int) -> None:
        """Takes the 0-d loss of a step."""
        self._begun = True
        self.total += loss
        self._bad += torch.where((self._bad == 0) & ~loss.isfinite(), step, 0)

    def mean(self, steps: int) -> float:
        """Returns the mean of the last ``steps`` steps over all ranks; the sum begins anew."""
        mean = float(self.ranks.all_gather(self.total).mean()) / steps
        self.total.zero_()
        self._begun = False
        return mean

    def bad(self) -> int:
        """Returns the first step without a finite loss on any rank; 0: there is none. Waits for the
        device.
        """
        found = self.ranks.all_gather(self._bad)
        return int(found[found > 0].min()) if bool(found.any()) else 0

    def samples_of(self, step: int) -> list[int]:
        """Returns the sample ids of a step's batch, rising; the step lies between the anchor and
        the next addition.
        """
        rows = self.loader.indices_after(self._position, step - self.step)
        return sorted(self.loader.pool.column("sample_id")[rows].tolist())

    def state_dict(self) -> dict[str, Any]:
        """Returns (ranks,) sums since the last ``mean``, and the anchor.

        Collective, but right after ``mean``: the sums are known there, and one rank may ask alone.
        """
        sums = self.ranks.all_gather(self.total) if self._begun else torch.zeros(self.ranks.size)
        return {"sums": sums, "step": self.step, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        sums = state["sums"]
        size = self.ranks.size
        self.total.copy_(sums[self.ranks.rank] if len(sums) == size else sums.mean())
        self._begun = True
        self.step = state["step"]
        self._position = state["position"]
