"""Denoisers: one call signature over diffusers' models; the files of
``dpfast.generate.pipelines.families`` hold those of each.

A denoiser maps (x, timestep, labels) to a prediction of x's shape, in the dtype of its weights.
Labels are class ids (B,) for every family, so that a captured step has one small input to refresh;
`null_label` is the id of classifier-free guidance's empty condition. Text-conditioned families hold
a table of embeddings by id and gather its rows inside the call. No call reads the host or branches
on data, so each is one full graph with ``torch.func.vjp`` around it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpfast.generate.models.frozen_layers import freeze_linear, fuse_projections
from dpfast.generate.models.fused import fuse
from dpfast.ops.guided_step import Prediction


class Denoiser(Protocol):
    """x: (B, *sample_shape) floating; timestep: 0-d, as in the solver's table; labels: (B,) int64
    in [0, classes).
    """

    classes: int
    null_label: int | None  # None where the model has no unconditional prediction
    sample_shape: tuple[int, int, int]
    prediction: Prediction

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor: ...


class ModelDenoiser:
    """A frozen diffusers model behind the call. A learned variance (twice the channels) is cut to
    the mean.

    fused: whether its blocks are replaced by their fused forms (``dpfast.generate.models.fused``).
    """

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

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        given = x.to(self.dtype, memory_format=self._layout)
        return self._predict(given, timestep.expand(len(x)), labels)[:, : x.shape[1]]

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError
