"""Denoisers: one call signature over diffusers' models.

A denoiser maps (x, timestep, labels) to a prediction of x's shape. Labels are class ids (B,) for every family, so that
a captured step has one small input to refresh; `null_label` is the id of classifier-free guidance's empty condition.
Text-conditioned families hold a table of embeddings by id and look it up inside the call.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from dpfast.ops.guided_step import Prediction


class Denoiser(Protocol):
    classes: int
    null_label: int | None  # None where the model has no unconditional prediction
    sample_shape: tuple[int, int, int]
    prediction: Prediction

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor: ...


class DiTDenoiser:
    """``DiTTransformer2DModel``, conditioned on class ids; the null class is the id after the last embedding row.

    A model with a learned variance (twice the latent channels) is cut to its mean prediction, as in ``DiTPipeline``.
    """

    def __init__(self, model: nn.Module, *, classes: int, prediction: Prediction) -> None:
        self.model = model.eval().requires_grad_(False)
        self.classes = classes
        self.prediction = prediction
        config: Any = model.config
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.null_label: int | None = int(config.num_embeds_ada_norm)

    def __call__(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        prediction = self.model(x, timestep=timestep.expand(len(x)), class_labels=labels).sample
        return prediction[:, : x.shape[1]]
