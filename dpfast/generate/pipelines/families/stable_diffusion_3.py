"""``StableDiffusion3Pipeline``: flow matching over prompts; the T5 encoder where there is one."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dpfast.generate.models.denoiser import PromptDenoiser
from dpfast.generate.pipelines import prompts as texts
from dpfast.generate.pipelines.families.common import (
    Family,
    LoadedParts,
    LoadOptions,
    decoder_of,
    flow_scheduler,
    names_of,
    network,
)
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.ops.guided_step import Prediction

T5_TOKENS = 256  # as StableDiffusion3Pipeline takes them, of zeros where the encoder is missing


class TextTransformerDenoiser(PromptDenoiser):
    """``SD3Transformer2DModel`` over prompts' embeddings and pooled ones (classes + 1, width).

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
        super().__init__(model, embeddings, prediction=prediction, fused=fused)
        self.pooled = pooled
        patch = int(self.model.config.patch_size)
        self.image_tokens = (self.sample_shape[1] // patch) * (self.sample_shape[2] // patch)

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        return self.model(
            hidden_states=x,
            timestep=timesteps,
            encoder_hidden_states=self.embeddings.index_select(0, labels),
            pooled_projections=self.pooled.index_select(0, labels),
        ).sample


def _stable_diffusion_3(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    prompts = options.prompts.texts(names)
    scheduler = flow_scheduler(folder)
    model = network(folder, diffusers.SD3Transformer2DModel, "transformer", options)
    decoder, channels = decoder_of(folder, model.config.in_channels, options)
    if options.planned:
        width, tokens = model.config.joint_attention_dim, T5_TOKENS
        embeddings = texts.blank(folder, prompts, width, more=tokens).to(options.dtype)
        pooled = embeddings.new_empty(len(prompts), model.config.pooled_projection_dim)
    else:
        embeddings, pooled = _encode(
            folder, prompts, model, device=options.device, dtype=options.dtype
        )
    denoiser = TextTransformerDenoiser(
        model, embeddings, pooled, prediction="flow", fused=options.fused
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _encode(
    folder: PipelineFolder,
    prompts: list[str],
    transformer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns embeddings (len(prompts), tokens, width) and pooled ones (len(prompts), width), both
    in ``dtype``.

    They are as ``StableDiffusion3Pipeline`` computes them: without the T5 encoder where the folder
    was saved without it.
    """
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2"), "CLIPTextModelWithProjection")
    if folder.class_of("text_encoder_3"):
        encoders["text_encoder_3"] = "T5EncoderModel"
    pipeline = texts.encoding_pipeline(
        folder,
        diffusers.StableDiffusion3Pipeline,
        encoders,
        device,
        dtype,
        transformer=transformer,
    )
    embeddings, pooled = texts.encoded(
        lambda part: pipeline.encode_prompt(
            part, None, None, device=device, do_classifier_free_guidance=False
        )[::2],
        prompts,
    )
    return embeddings, pooled


FAMILIES = {
    "StableDiffusion3Pipeline": Family(
        _stable_diffusion_3,
        needs=(
            "transformer",
            "vae",
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "scheduler",
        ),
        models=("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
        sized=True,
        float8=True,
    )
}
