"""The training loss: its mean between evaluations, and the first step at which it is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from dpfast.feed.loader import Loader
from dpfast.parallel import ALONE, Ranks


class Losses:
    """Takes every step's loss and reads none of them, so that a GPU's queue stays full.

    ``anchor`` remembers where the loader stands; the samples of a bad step are drawn again from
    there.
    """

    def __init__(self, loader: Loader, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.loader, self.ranks = loader, ranks
        self.total = torch.zeros((), device=device)  # since the last ``mean``
        self._bad = torch.zeros(
            (), dtype=torch.int64, device=device
        )  # the first step without a finite loss; 0: none
        self.anchor(0)

    def anchor(self, step: int) -> None:
        """All steps up to this one were good, and the loader stands behind it."""
        self._step, self._position = step, self.loader.state_dict()

    def add(self, loss: Tensor, step: int) -> None:
        self.total += loss
        self._bad += torch.where((self._bad == 0) & ~loss.isfinite(), step, 0)

    def mean(self, steps: int) -> float:
        """Of the last ``steps`` steps over all ranks; the sum begins anew."""
        mean = float(self.ranks.all_gather(self.total).mean()) / steps
        self.total.zero_()
        return mean

    def bad(self) -> int:
        """The first step without a finite loss on any rank; 0: there is none. Waits for the
        device.
        """
        found = self.ranks.all_gather(self._bad)
        return int(found[found > 0].min()) if bool(found.any()) else 0

    def samples_of(self, step: int) -> list[int]:
        """The sample ids of a step's batch, rising; the step lies between the anchor and the next
        addition.
        """
        rows = self.loader.indices_after(self._position, step - self._step)
        return sorted(self.loader.pool.column("sample_id")[rows].tolist())
