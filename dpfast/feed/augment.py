"""Augmentations of a batch, drawn from an explicit generator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_flips(batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) bool, True for the half of the samples that is mirrored."""
    return torch.rand(batch, generator=generator) < 0.5


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Moves every image (B, C, H, W) by its own offset of up to ``pixels`` each way; repeats the border."""
    if pixels == 0:
        return images
    batch, _, height, width = images.shape
    offsets = torch.randint(0, 2 * pixels + 1, (2, batch), generator=generator)
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    rows = (offsets[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (offsets[1][:, None] + torch.arange(width))[:, None, None, :]
    sample = torch.arange(batch)[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[sample, channel, rows, columns].contiguous(memory_format=torch.channels_last)
