"""Denoisers: one call signature over diffusers' models; the files of
``dpfast.generate.pipelines.families`` hold those of each.

A denoiser maps (x, timestep, labels) to a prediction of x's shape, in the dtype of its weights.
Labels are class ids (B,) for every family, so that a captured step has one small input to refresh;
`null_label` is the id of classifier-free guidance's empty condition. Text-conditioned families hold
a table of embeddings by id and gather its rows inside the call. Where classes have several prompts,
the ids of a call are rows of that table, found by label and sample id (``PromptRows``). No call
reads the host or branches on data, so each is one full graph with ``torch.func.vjp`` around it.

A model that was distilled with its guidance takes the scale as an embedding and makes one
prediction: its denoiser has ``embeds_scale`` and a fourth argument (``predict``), and no null
label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpfast.generate.models.frozen_layers import freeze_linear, fuse_projections
from dpfast.generate.models.fused import fuse
from dpfast.ops.guided_step import Prediction

WORD = 0xFFFFFFFF


class Denoiser(Protocol):
    """The call of every denoiser. x: (B, *sample_shape) floating; timestep: 0-d, as in the solver's
    table; labels: (B,) int64 in [0, classes).
    """

    classes: int
    null_label: int | None  # None where the model has no unconditional prediction
    sample_shape: tuple[int, int, int]
    prediction: Prediction

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor: ...


class PromptRows:
    """The choice among a class's prompts for each sample.

    The prompts of class c are the next ``counts[c]`` rows of a table, behind those of the classes
    before it. A sample takes number floor(n h / 2^32) of its class's n, h being a 32-bit hash of
    its id (the finaliser of MurmurHash3, Appleby): the same one in any batch and any run.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = torch.tensor(counts, dtype=torch.int64, device=device)
        self.first = self.counts.cumsum(0) - self.counts

    def of(self, labels: Tensor, sample_ids: Tensor) -> Tensor:
        """Returns (B,) int64 rows, for class ids and sample ids (B,) int64. Reads nothing on the
        host.
        """
        h = (sample_ids ^ (sample_ids >> 32)) & WORD
        # less 2^32 the factors give the same words, and no product beyond 63 bits
        h = ((h ^ (h >> 16)) * (0x85EBCA6B - 2**32)) & WORD
        h = ((h ^ (h >> 13)) * (0xC2B2AE35 - 2**32)) & WORD
        h = h ^ (h >> 16)
        numbers = (h * self.counts.index_select(0, labels)) >> 32
        return self.first.index_select(0, labels) + numbers


def embeds_scale(denoiser: Denoiser) -> bool:
    """Returns True if the scale of classifier-free guidance is an input of the model."""
    return bool(getattr(denoiser, "embeds_scale", False))


def predict(
    denoiser: Denoiser, x: Tensor, timestep: Tensor, labels: Tensor, scale: Tensor | None
) -> Tensor:
    """Returns the denoiser's prediction. scale: 0-d, of classifier-free guidance, for a model that
    embeds it; None: as without guidance.
    """
    call: Any = denoiser
    if scale is None or not embeds_scale(denoiser):
        return call(x, timestep, labels)
    return call(x, timestep, labels, scale)


class ModelDenoiser:
    """A frozen diffusers model behind the call. A learned variance (twice the channels) is cut to
    the mean.

    fused: whether its blocks are replaced by their fused forms (``dpfast.generate.models.fused``).
    rows: of the prompts of samples; None where a class has one condition. embeds_scale: whether the
    model takes the scale of guidance. whole_timesteps: whether timesteps must be those of the
    training, because there are tables of them.
    """

    rows: PromptRows | None = None
    embeds_scale = False
    whole_timesteps = False

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        null_label: int | None,
        prediction: Prediction,
        fused: bool = False,
    ) -> None:
        frozen = fuse_projections(model.eval()).requires_grad_(False)
        self.model: Any = fuse(frozen) if fused else freeze_linear(frozen)
        self.classes = classes
        self.null_label = null_label
        self.prediction = prediction
        config: Any = model.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (int(config.in_channels), int(height), int(width))
        self.dtype = next(model.parameters()).dtype
        nhwc = fused and hasattr(model, "conv_in")
        self._layout = torch.channels_last if nhwc else torch.preserve_format

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor, *scale: Tensor) -> Tensor:
        given = x.to(self.dtype, memory_format=self._layout)
        return self._predict(given, timestep.expand(len(x)), labels, *scale)[:, : x.shape[1]]

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *scale: Tensor) -> Tensor:
        raise NotImplementedError


class PromptDenoiser(ModelDenoiser):
    """A model over the embeddings of prompts (classes + 1, tokens, width), of its dtype and device.

    The last row, here and in every further table by prompt, belongs to the empty or the negative
    prompt. A model that embeds the scale of guidance (``embeds_scale``) has no use for it.
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: Tensor,
        *,
        prediction: Prediction,
        embeds_scale: bool = False,
        fused: bool = False,
    ) -> None:
        classes = len(embeddings) - 1
        null_label = None if embeds_scale else classes
        super().__init__(
            model, classes=classes, null_label=null_label, prediction=prediction, fused=fused
        )
        self.embeddings, self.embeds_scale = embeddings, embeds_scale
