"""``DiTPipeline``: class ids; the class id after the last embedding row is the null class.

With a flow-matching scheduler it is what SiT and REPA train: the same network, of a velocity.
"""

from __future__ import annotations

from typing import Any

import diffusers
from torch import Tensor, nn

from dpfast.generate.models.denoiser import ModelDenoiser
from dpfast.generate.models.frozen_layers import share_conditioning
from dpfast.generate.pipelines.families.common import (
    Family,
    LoadedParts,
    LoadOptions,
    decoder_of,
    names_of,
    network,
)
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.solvers import load_scheduler, prediction_of
from dpfast.ops.guided_step import Prediction


class DiTDenoiser(ModelDenoiser):
    """``DiTTransformer2DModel``, conditioned on class ids; the null class is the id after the last
    embedding row.

    ``timesteps``: of the training, where those of a table are among them; the time's embeddings are
    then tables. None for a flow, whose table stops between them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        prediction: Prediction,
        timesteps: int | None,
        fused: bool = False,
    ) -> None:
        config: Any = model.config
        super().__init__(
            model if timesteps is None else share_conditioning(model, timesteps),
            classes=classes,
            null_label=int(config.num_embeds_ada_norm),
            prediction=prediction,
            fused=fused,
        )
        self.whole_timesteps = timesteps is not None

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        # in a table one row of time for all samples
        given = timesteps[:1] if self.whole_timesteps else timesteps
        return self.model(x, timestep=given, class_labels=labels).sample


def _dit(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    scheduler = load_scheduler(folder.path, latent=True)
    model = network(folder, diffusers.DiTTransformer2DModel, "transformer", options)
    if len(names) > model.config.num_embeds_ada_norm:
        raise folder.error(
            f"{len(names)} class names for a model of {model.config.num_embeds_ada_norm} classes"
        )
    decoder, channels = decoder_of(folder, model.config.in_channels, options)
    prediction = prediction_of(scheduler)
    denoiser = DiTDenoiser(
        model,
        classes=len(names),
        prediction=prediction,
        timesteps=None if prediction == "flow" else scheduler.config.num_train_timesteps,
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


FAMILIES = {
    "DiTPipeline": Family(
        _dit,
        needs=("transformer", "vae", "scheduler"),
        models=("transformer", "vae"),
        float8=True,
    )
}
