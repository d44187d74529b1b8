"""`gather_batch` in plain PyTorch; the formula stands in dpfast/ops/gather.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Request(NamedTuple):
    """What a batch is made of; `scale` and `bias` are one fp32 number for each channel: byte *
    scale + bias.
    """

    store: Tensor
    indices: Tensor
    flip: Tensor | None
    scale: Tensor
    bias: Tensor


def reference(request: Request) -> Tensor:
    """The formula in plain PyTorch: a contiguous fp32 batch."""
    rows = request.store.index_select(0, request.indices).float()
    if request.flip is not None:
        rows = torch.where(request.flip[:, None, None, None], rows.flip(3), rows)
    return rows * request.scale[:, None, None] + request.bias[:, None, None]
