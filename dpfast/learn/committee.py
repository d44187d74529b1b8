"""Several weights of one classifier as one learner, for criteria that compare their predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Committee(nn.Module):
    """Images (B, C, H, W) to logits (B, M, K), a row for each of M members, which are read live.

    The first member speaks for all where one prediction is asked for. A batch costs the forwards
    and backwards of all.
    """

    def __init__(self, *members: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([member(images) for member in self.members], dim=1)


def guiding(criterion: str, guide: nn.Module, other: nn.Module) -> nn.Module:
    """What a sampler takes for its learner: ``guide``, or for the criterion "disagreement" it and
    ``other``.
    """
    return Committee(guide, other) if criterion == "disagreement" else guide
