"""Samples on their way, so that they may stop, thin out and go on: what a trajectory carries from
step to step; and what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ROWS = ("x", "x0_prev", "labels", "sample_ids", "omega", "value", "features")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A batch before its step ``step``; row i of every tensor belongs to ``sample_ids[i]``.

    x: (B, c, h, w) float32 latents; x0_prev: the same, the x0 of the step before, None where the
    solver has no use for it; labels, sample_ids: (B,) int64; omega: (B,) float32, None: unguided;
    cfg_scale: of all its steps;
    value: (B,) float32, the criterion at the x0 that the last guided step predicted, None before
    it; features: as in ``StepInputs``, where the next step reuses them; skipped: 0-d int64, as in
    ``SampleBatch``, of all that ever belonged to the batch.
    """

    x: Tensor
    labels: Tensor
    sample_ids: Tensor
    skipped: Tensor
    cfg_scale: float
    x0_prev: Tensor | None = None
    omega: Tensor | None = None
    value: Tensor | None = None
    features: Tensor | None = None
    step: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Trajectory:
        """The samples of these rows, (n,) int64."""
        columns = {name: getattr(self, name) for name in ROWS}
        held: dict[str, Any] = {
            name: None if column is None else column[rows] for name, column in columns.items()
        }
        return replace(self, **held)

    @staticmethod
    def joined(parts: Sequence[Trajectory]) -> Trajectory:
        """Batches before the same step as one."""
        columns = {name: [getattr(part, name) for part in parts] for name in ROWS}
        joined: dict[str, Any] = {
            name: None if column[0] is None else torch.cat(column)
            for name, column in columns.items()
        }
        return replace(
            parts[0], **joined, skipped=torch.stack([part.skipped for part in parts]).sum()
        )


def filled(rows: Tensor, count: int) -> Tensor:
    """``rows`` with ``count`` copies of the last one behind them."""
    return rows if not count else torch.cat([rows, rows[-1:].expand(count, *rows.shape[1:])])
