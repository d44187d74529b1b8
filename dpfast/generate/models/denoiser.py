"""Denoisers: one call signature over diffusers' models.

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

from dpfast.generate.models.frozen_layers import freeze_linear, fuse_projections, share_conditioning
from dpfast.generate.models.fused import fuse, share_conditions
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


class _ModelDenoiser:
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


class DiTDenoiser(_ModelDenoiser):
    """``DiTTransformer2DModel``, conditioned on class ids; the null class is the id after the last
    embedding row.

    ``timesteps``: of the training; those of a table are among them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        prediction: Prediction,
        timesteps: int,
        fused: bool = False,
    ) -> None:
        config: Any = model.config
        super().__init__(
            share_conditioning(model, timesteps),
            classes=classes,
            null_label=int(config.num_embeds_ada_norm),
            prediction=prediction,
            fused=fused,
        )

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        # one row of time for all samples
        return self.model(x, timestep=timesteps[:1], class_labels=labels).sample


class PixelUNetDenoiser(_ModelDenoiser):
    """``UNet2DModel``, unconditional or conditioned on class ids.

    The model has no null class of its own. One embedding row more than ``classes`` is taken as the
    null class, as training with dropped labels leaves it; with as many rows as classes there is no
    unconditional prediction.
    """

    def __init__(
        self, model: nn.Module, *, classes: int, prediction: Prediction, fused: bool = False
    ) -> None:
        config: Any = model.config
        rows = config.num_class_embeds
        super().__init__(
            model,
            classes=classes,
            null_label=classes if rows == classes + 1 else None,
            prediction=prediction,
            fused=fused,
        )
        self._conditional = rows is not None

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return self.model(x, timesteps, class_labels=labels if self._conditional else None).sample


class TextUNetDenoiser(_ModelDenoiser):
    """``UNet2DConditionModel`` of Stable Diffusion 1.x and 2.x over prompts' embeddings (classes +
    1, tokens, width).

    They have the model's dtype and device; the last row belongs to the empty prompt. ``timesteps``:
    of the training, where those of a table are among them; a fused model then tabulates its time.
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: Tensor,
        *,
        prediction: Prediction,
        timesteps: int | None = None,
        fused: bool = False,
    ) -> None:
        classes = len(embeddings) - 1
        super().__init__(
            model, classes=classes, null_label=classes, prediction=prediction, fused=fused
        )
        self.embeddings = embeddings
        self._text = None
        if fused and timesteps is not None:
            self._text = share_conditions(model, timesteps)

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        text = self.embeddings.index_select(0, labels)
        text = text if self._text is None else self._text(text)
        return self.model(x, timesteps, encoder_hidden_states=text).sample


class TextTransformerDenoiser(_ModelDenoiser):
    """``SD3Transformer2DModel`` over prompts' embeddings (classes + 1, tokens, width) and pooled
    ones (classes + 1, w).

    They have the model's dtype and device; the last rows belong to the empty prompt.
    ``image_tokens`` is the length of the image sequence.
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: Tensor,
        pooled: Tensor,
        *,
        prediction: Prediction,
        fused: bool = False,
    ) -> None:
        classes = len(embeddings) - 1
        super().__init__(
            model, classes=classes, null_label=classes, prediction=prediction, fused=fused
        )
        self.embeddings, self.pooled = embeddings, pooled
        patch = int(self.model.config.patch_size)
        self.image_tokens = (self.sample_shape[1] // patch) * (self.sample_shape[2] // patch)

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return self.model(
            hidden_states=x,
            timestep=timesteps,
            encoder_hidden_states=self.embeddings.index_select(0, labels),
            pooled_projections=self.pooled.index_select(0, labels),
        ).sample
