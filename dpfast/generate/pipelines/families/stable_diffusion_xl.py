"""``StableDiffusionXLPipeline``, the base without the refiner: two text encoders, and what prompt
and sizes add to the time. Turbo, Lightning and LCM folders are of this class, too.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from dpfast.generate.pipelines import prompts as texts
from dpfast.generate.pipelines.families.common import (
    Family,
    LoadedParts,
    LoadOptions,
    decoder_of,
    names_of,
    network,
    pixels_of_latents,
)
from dpfast.generate.pipelines.families.stable_diffusion import TextUNetDenoiser, prompts_alone
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.solvers import load_scheduler, prediction_of

SIZES = 6  # original height and width, place of the crop, height and width
ZEROS = "force_zeros_for_empty_prompt"


def _stable_diffusion_xl(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    prompts = options.prompts.texts(names)
    scheduler = load_scheduler(folder.path, latent=True)
    model = network(folder, diffusers.UNet2DConditionModel, "unet", options)
    prompts_alone(folder, model)
    if model.config.addition_embed_type != "text_time":
        raise folder.error(
            f"'unet' has addition_embed_type = {model.config.addition_embed_type!r}; expected "
            "'text_time'"
        )
    decoder, channels = decoder_of(folder, model.config.in_channels, options)
    if options.planned:
        embeddings = texts.blank(folder, prompts, model.config.cross_attention_dim)
        embeddings = embeddings.to(options.dtype)
        sizes = SIZES * model.config.addition_time_embed_dim
        wide = model.config.projection_class_embeddings_input_dim - sizes
        pooled = embeddings.new_empty(len(prompts), wide)
    else:
        embeddings, pooled = _encode(folder, prompts, device=options.device, dtype=options.dtype)
    denoiser = TextUNetDenoiser(
        model,
        embeddings,
        prediction=prediction_of(scheduler),
        added=added_rows(folder, model, pooled),
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


@torch.no_grad()
def added_rows(folder: PipelineFolder, model: Any, pooled: Tensor) -> Tensor:
    """Returns the rows that pooled embeddings (classes + 1, w) and the sizes of an image add to the
    embedding of the time, (classes + 1, E).

    The sizes are those that the pipeline takes by itself: an original of the size of the image, no
    crop. Raises ``InputError`` for a UNet that takes others, as the refiner's does.
    """
    size, scale = model.config.sample_size, pixels_of_latents(folder)
    sides = [side * scale for side in ((size, size) if isinstance(size, int) else size)]
    ids = torch.tensor([*sides, 0, 0, *sides], dtype=pooled.dtype, device=pooled.device)
    given = model.config.addition_time_embed_dim * SIZES + pooled.shape[1]
    expected = model.config.projection_class_embeddings_input_dim
    if given != expected:
        raise folder.error(
            f"'unet' takes {expected} numbers of prompt and sizes "
            f"(projection_class_embeddings_input_dim), and 'text_encoder_2' and {SIZES} sizes "
            f"give {given}; expected as many"
        )
    conditions = {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}
    return model.get_aug_embed(emb=pooled, encoder_hidden_states=None, added_cond_kwargs=conditions)


def _encode(
    folder: PipelineFolder, prompts: list[str], *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns embeddings (len(prompts), tokens, width) and pooled ones (len(prompts), w), both in
    ``dtype``, as ``StableDiffusionXLPipeline`` computes them: hidden states of both encoders' last
    layer but one, pooled ones of the second. Without a negative prompt the last rows are zeros,
    unless the folder says otherwise.
    """
    zeros = folder.index.get(ZEROS, True)
    if not isinstance(zeros, bool):
        raise folder.error(f"model_index.json: {ZEROS} = {zeros!r}: expected true or false")
    pipeline = texts.encoding_pipeline(
        folder,
        diffusers.StableDiffusionXLPipeline,
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        device,
        dtype,
        add_watermarker=False,
    )
    embeddings, pooled = texts.encoded(
        lambda part: pipeline.encode_prompt(part, device=device, do_classifier_free_guidance=False)[
            ::2
        ],
        prompts,
    )
    if zeros and not prompts[-1]:
        embeddings[-1], pooled[-1] = 0.0, 0.0
    return embeddings, pooled


FAMILIES = {
    "StableDiffusionXLPipeline": Family(
        _stable_diffusion_xl,
        needs=(
            "unet",
            "vae",
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "scheduler",
        ),
        models=("unet", "vae", "text_encoder", "text_encoder_2"),
        sized=True,
    )
}
