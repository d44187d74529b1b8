"""``StableDiffusionPipeline``: 1.x and 2.x; one prompt a class, the empty one is the null class."""

from __future__ import annotations

import diffusers
import torch
from torch import Tensor, nn

from dpfast.generate.models.denoiser import ModelDenoiser
from dpfast.generate.models.fused import share_conditions
from dpfast.generate.pipelines import prompts as texts
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


class TextUNetDenoiser(ModelDenoiser):
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


def _stable_diffusion(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    prompts = options.prompts.texts(names)
    # as StableDiffusionPipeline sets every scheduler: old folders of this family name other values
    scheduler = load_scheduler(folder.path, latent=True, clip_sample=False, steps_offset=1)
    model = network(folder, diffusers.UNet2DConditionModel, "unet", options)
    for option in (
        "time_cond_proj_dim",
        "class_embed_type",
        "num_class_embeds",
        "addition_embed_type",
    ):
        if model.config.get(option) is not None:
            raise folder.error(
                f"'unet' has {option} = {model.config[option]!r}; expected a UNet of prompts alone"
            )
    decoder, channels = decoder_of(folder, model.config.in_channels, options)
    embeddings = _encode(folder, prompts, device=options.device, dtype=options.dtype)
    denoiser = TextUNetDenoiser(
        model,
        embeddings,
        prediction=prediction_of(scheduler),
        timesteps=scheduler.config.num_train_timesteps,
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _encode(
    folder: PipelineFolder, prompts: list[str], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Embeddings (len(prompts), tokens, width) in ``dtype``, as ``StableDiffusionPipeline``
    computes them.
    """
    transformers = texts.transformers_library()
    encoder = texts.encoder(folder, transformers.CLIPTextModel, "text_encoder", device, dtype)
    pipeline = diffusers.StableDiffusionPipeline(
        **texts.pipeline_parts(
            diffusers.StableDiffusionPipeline,
            text_encoder=encoder,
            tokenizer=texts.tokenizer(folder, "tokenizer"),
        ),
        requires_safety_checker=False,
    )
    return torch.cat(
        [pipeline.encode_prompt(part, device, 1, False)[0] for part in texts.split(prompts)]
    )


FAMILIES = {
    "StableDiffusionPipeline": Family(
        _stable_diffusion,
        needs=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        models=("unet", "vae", "text_encoder"),
        sized=True,
    )
}
