"""Samples as they pass from station to station: what a sampler makes and a pool keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    """What a sampler yields. Row i of every tensor belongs to ``sample_ids[i]``.

    images: (B, C, H, W) uint8; labels, sample_ids: (B,) int64; entropy: (B,) float32, nats, of the
    finished image under the guiding learner (NaN without one); learner_step: the learner's
    optimiser steps at birth; skipped: how many guided steps of single samples went unguided,
    because their gradient was not finite; retries: how often memory ran out before the batch was
    small enough; latents: (B, c, h, w) float16, what the images were decoded from.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    entropy: Tensor
    learner_step: int = 0
    skipped: int = 0
    latents: Tensor | None = None
    retries: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor | slice) -> SampleBatch:
        """The samples of some rows, a slice or (n,) indices."""
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            sample_ids=self.sample_ids[rows],
            entropy=self.entropy[rows],
            latents=None if self.latents is None else self.latents[rows],
        )
