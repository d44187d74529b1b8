"""``GuidedSampler``: class labels to images, pushed towards high entropy under a learner while they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpfast.config import RecipeError
from dpfast.generate.guidance import GuidanceConfig, entropy_gradient
from dpfast.generate.pipeline import Pipeline
from dpfast.generate.schedule import ddim_table
from dpfast.ops import entropy, guided_step, normal

INITIAL_NOISE = 0  # the Philox stream of the first latent; the streams of the steps follow it


@dataclass(frozen=True, kw_only=True)
class SampleBatch:
    """What a sampler yields. Row i of every field belongs to ``sample_ids[i]``.

    images: (B, C, H, W) uint8; labels, sample_ids: (B,) int64; entropy: (B,) float32, nats, of the finished image under
    the guiding learner (NaN without one); learner_step: the learner's optimiser steps at birth.
    """

    images: Tensor
    labels: Tensor
    sample_ids: Tensor
    entropy: Tensor
    learner_step: int = 0

    def __len__(self) -> int:
        return len(self.labels)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, rounded as diffusers' image processor does."""
    return images.mul(0.5).add(0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


class GuidedSampler:
    """Samples a diffusers pipeline folder with DDIM, classifier-free guidance and entropy guidance.

    The same sample id, label, seed and learner give the same image in any batch. The learner is read live: an update
    of its weights in place shows in the next batch. It is called in its current mode, so pass it in ``eval()``.

    Args:
        pipeline: from ``Pipeline.from_pretrained``.
        learner: images (B, C, H, W) in [-1, 1] to logits (B, K), or None for unguided sampling.
        guidance: strength and schedule; ignored without a learner.
        steps, cfg_scale, eta: as in ``DiTPipeline`` with a ``DDIMScheduler``.
        seed: key of all noise.
        image_size: (H, W) that the learner takes; None: as decoded.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        learner: Callable[[Tensor], Tensor] | None = None,
        *,
        guidance: GuidanceConfig | None = None,
        steps: int = 15,
        cfg_scale: float = 1.5,
        eta: float = 0.0,
        seed: int = 0,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.learner = learner
        self.guidance = guidance or GuidanceConfig()
        self.cfg_scale = cfg_scale
        self.seed = seed
        self.image_size = image_size
        self.table = ddim_table(pipeline.scheduler, steps, eta=eta).to(pipeline.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, learner: nn.Module | None = None, **options: object) -> GuidedSampler:
        """``GuidedSampler(Pipeline.from_pretrained(folder), learner, **options)``."""
        return cls(Pipeline.from_pretrained(folder), learner, **options)  # type: ignore[arg-type]

    def check_labels(self, labels: Tensor) -> None:
        """Raises ``RecipeError`` for a label that the generator does not know."""
        classes = self.pipeline.denoiser.classes
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise RecipeError(f"labels = {int(wrong[0])}: the generator has {classes} classes, 0 to {classes - 1}")

    @torch.no_grad()
    def generate(
        self, labels: Tensor | Sequence[int], sample_ids: Tensor | Sequence[int] | None = None, *, learner_step: int = 0
    ) -> SampleBatch:
        """One batch. labels: (B,) class ids; sample_ids: (B,) keys of the noise, default 0..B-1."""
        labels = torch.as_tensor(labels, dtype=torch.int64).to(self.pipeline.device)
        ids = torch.arange(len(labels)) if sample_ids is None else torch.as_tensor(sample_ids, dtype=torch.int64)
        ids = ids.to(labels.device)
        if ids.shape != labels.shape:
            raise ValueError(f"sample_ids has shape {tuple(ids.shape)}, expected one per label: {tuple(labels.shape)}")
        self.check_labels(labels)
        latents = self.denoise(
            normal(ids, self.pipeline.denoiser.sample_shape, seed=self.seed, stream=INITIAL_NOISE), labels, ids
        )
        images = to_uint8(self.pipeline.decoder(latents))
        return SampleBatch(
            images=images, labels=labels, sample_ids=ids, entropy=self._entropy(images), learner_step=learner_step
        )

    def stream(
        self, labels: Tensor | Sequence[int], *, first_id: int = 0, batch_size: int = 250, learner_step: int = 0
    ) -> Iterator[SampleBatch]:
        """Yields batches of at most ``batch_size`` for all ``labels``; sample ids count up from ``first_id``."""
        labels = torch.as_tensor(labels, dtype=torch.int64)
        ids = torch.arange(first_id, first_id + len(labels))
        for part, part_ids in zip(labels.split(batch_size), ids.split(batch_size), strict=True):
            yield self.generate(part, part_ids, learner_step=learner_step)

    def denoise(self, x: Tensor, labels: Tensor, sample_ids: Tensor) -> Tensor:
        """Runs all steps on initial latents (B, c, h, w), unit noise, and returns the final latents."""
        null_label = self.pipeline.denoiser.null_label
        null = None if self.cfg_scale == 1 or null_label is None else torch.full_like(labels, null_label)
        guided = self.guidance.steps(len(self.table)) if self.learner is not None else frozenset()
        x = x * self.table.initial_scale
        for step in range(len(self.table)):
            x = self._step(x, step, labels, null, sample_ids, guided=step in guided)
        return x

    def _step(
        self, x: Tensor, step: int, labels: Tensor, null: Tensor | None, sample_ids: Tensor, *, guided: bool
    ) -> Tensor:
        denoiser, timestep = self.pipeline.denoiser, self.table.timesteps[step]
        gradient = unconditional = None
        if guided:
            assert self.learner is not None
            alpha, sigma = self.table.rows[step, :2]
            gradient, conditional, _ = entropy_gradient(
                x,
                timestep,
                labels,
                alpha,
                sigma,
                denoiser=denoiser,
                decoder=self.pipeline.guidance_decoder,
                learner=self.learner,
                image_size=self.image_size,
            )
            if null is not None:
                unconditional = denoiser(x, timestep, null)
        elif null is not None:
            conditional, unconditional = denoiser(torch.cat([x, x]), timestep, torch.cat([labels, null])).chunk(2)
        else:
            conditional = denoiser(x, timestep, labels)
        return guided_step(
            x,
            conditional,
            unconditional,
            gradient,
            self.table.rows,
            step,
            cfg_scale=self.cfg_scale,
            omega=self.guidance.omega,
            mode=self.guidance.mode,
            prediction=denoiser.prediction,
            sample_ids=sample_ids,
            seed=self.seed,
        )

    def _entropy(self, images: Tensor) -> Tensor:
        if self.learner is None:
            return torch.full((len(images),), float("nan"))
        return entropy(self.learner(images.float().div(127.5).sub(1)))
