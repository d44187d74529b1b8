"""Samples as they pass from station to station: what a sampler makes and a pool keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    """The samples that a sampler yields. Row i of every tensor belongs to ``sample_ids[i]``.

    Attributes:
        images: (B, C, H, W) uint8.
        labels: (B,) int64 class ids.
        sample_ids: (B,) int64 keys of the noise.
        entropy: (B,) float32, nats, of the finished images under the guiding learner; NaN without
            one.
        learner_step: Optimiser steps of the learner at birth.
        skipped: Guided steps of single samples that went unguided, because their gradient was not
            finite.
        latents: (B, c, h, w) float16 that the images were decoded from, or None.
        retries: Times that memory ran out before the batch was small enough.
        files: B JPEG files of the images, where those exist.
        origins: (B,) ``dpfast.pool.record.RECORD``, the columns of samples that were made before,
            or by nobody.

    Examples:
        >>> import torch
        >>> from dpfast import SampleBatch
        >>> batch = SampleBatch(
        ...     images=torch.zeros(3, 1, 32, 32, dtype=torch.uint8),
        ...     labels=torch.tensor([5, 7, 9]),
        ...     sample_ids=torch.arange(3),
        ...     entropy=torch.zeros(3),
        ... )
        >>> batch.take(slice(1, 3)).labels
        tensor([7, 9])
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    entropy: Tensor
    learner_step: int = 0
    skipped: int = 0
    latents: Tensor | None = None
    retries: int = 0
    files: Sequence[bytes] | None = None
    origins: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor | slice) -> SampleBatch:
        """Returns the samples of some rows, a slice or (n,) indices."""
        chosen = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows].numpy()
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            sample_ids=self.sample_ids[rows],
            entropy=self.entropy[rows],
            latents=None if self.latents is None else self.latents[rows],
            files=None if self.files is None else [self.files[row] for row in chosen],
            origins=None if self.origins is None else self.origins[chosen],
        )
