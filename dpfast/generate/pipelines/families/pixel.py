"""``DDIMPipeline`` and ``DDPMPipeline``: pixels, unconditional or of class ids."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import Tensor, nn

from dpfast.generate.models.decoder import IdentityDecoder
from dpfast.generate.models.denoiser import ModelDenoiser
from dpfast.generate.pipelines.families.common import Family, LoadedParts, LoadOptions, network
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.solvers import load_scheduler, prediction_of
from dpfast.ops.guided_step import Prediction


class PixelUNetDenoiser(ModelDenoiser):
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

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        return self.model(x, timesteps, class_labels=labels if self._conditional else None).sample


def _pixel(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    scheduler = load_scheduler(folder.path, latent=False)
    if prediction_of(scheduler) == "flow":
        raise folder.error(
            f"scheduler {type(scheduler).__name__}: a {folder.kind} needs one with betas"
        )
    model = network(folder, diffusers.UNet2DModel, "unet", options)
    config = model.config
    rows = config.num_class_embeds
    if config.class_embed_type is not None:
        raise folder.error(
            f"'unet' has class_embed_type = {config.class_embed_type!r}; expected num_class_embeds"
        )
    names = folder.class_names(options.class_names)
    if names is None:
        names = ("unconditional",) if rows is None else tuple(f"class {i}" for i in range(rows))
    if rows is not None and len(names) not in (rows, rows - 1):
        raise folder.error(
            f"{len(names)} class names for a model of {rows} class embeddings; expected {rows}, or "
            f"{rows - 1} where the last embedding is the null class"
        )
    denoiser = PixelUNetDenoiser(
        model, classes=len(names), prediction=prediction_of(scheduler), fused=options.fused
    )
    return LoadedParts(denoiser, IdentityDecoder(), scheduler, names, int(config.in_channels))


_PIXEL = Family(_pixel, needs=("unet", "scheduler"), models=("unet",))
FAMILIES = {"DDIMPipeline": _PIXEL, "DDPMPipeline": _PIXEL}
