"""``FluxPipeline``: FLUX.1 dev, which embeds the scale of guidance, and schnell, which has none."""

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

PATCH = 2  # latents in the height and width of a token
SIDE = 128  # of the latents, as FluxPipeline takes them: the model does not say
TOKENS = {True: 512, False: 256}  # of T5; the most that dev, and schnell, was trained with


class FluxDenoiser(PromptDenoiser):
    """``FluxTransformer2DModel`` over prompts' embeddings behind the model's embedding of the
    context, and pooled ones (classes + 1, width) behind that of the text.

    Latents are packed to tokens of 2 x 2 inside the call. ``image_tokens`` is the length of the
    image sequence.
    """

    even_grid = True

    def __init__(
        self, model: nn.Module, embeddings: Tensor, pooled: Tensor, *, fused: bool = False
    ) -> None:
        config: Any = model.config
        super().__init__(
            model,
            embeddings,
            prediction="flow",
            embeds_scale=bool(config.guidance_embeds),
            fused=fused,
        )
        self.pooled = pooled
        channels, height, width = self.sample_shape
        self.sample_shape = (channels // PATCH**2, height, width)
        self.grid = (height // PATCH, width // PATCH)
        self.image_tokens = self.grid[0] * self.grid[1]
        places = positions(*self.grid, like=embeddings)
        rotations = self.model.pos_embed(
            torch.cat([places.new_zeros(embeddings.shape[1], 3), places])
        )
        self.model.pos_embed = _Given(rotations)
        self.model.context_embedder = nn.Identity()  # the tables lie behind both
        self.model.time_text_embed.text_embedder = nn.Identity()
        self.text_ids = places.new_empty(0, 3)  # the positions are a table as well
        self.one = torch.ones((), device=embeddings.device)

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *scale: Tensor) -> Tensor:
        guidance = None
        if self.embeds_scale:
            guidance = (scale[0] if scale else self.one).float().expand(len(x))
        packed = self.model(
            hidden_states=_packed(x, self.grid),
            timestep=timesteps.to(x.dtype) / 1000,
            guidance=guidance,
            pooled_projections=self.pooled.index_select(0, labels),
            encoder_hidden_states=self.embeddings.index_select(0, labels),
            txt_ids=self.text_ids,
            img_ids=self.text_ids,
        ).sample
        return _unpacked(packed, self.grid)


class _Given(nn.Module):
    """A constant in the place of a model's rotary embeddings, which are the same for all
    samples.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, rotations: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        for name, each in zip(("cosines", "sines"), rotations, strict=True):
            self.register_buffer(name, each, persistent=False)

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        return self.cosines, self.sines


def positions(height: int, width: int, *, like: Tensor) -> Tensor:
    """Returns (height width, 3) of the tokens of an image: 0, row, column; in float32."""
    rows, columns = (torch.arange(n, device=like.device).float() for n in (height, width))
    places = [rows.new_zeros(height, width), *torch.meshgrid(rows, columns, indexing="ij")]
    return torch.stack(places, dim=-1).reshape(height * width, 3)


def _packed(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Returns latents (B, c, h, w) to tokens (B, h w / 4, 4 c)."""
    parts = x.unflatten(3, (grid[1], PATCH)).unflatten(2, (grid[0], PATCH))
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(len(x), grid[0] * grid[1], -1)


def _unpacked(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    parts = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, grid)
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def _flux(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    prompts = options.prompts.texts(names)
    scheduler = flow_scheduler(folder)
    model = network(
        folder,
        diffusers.FluxTransformer2DModel,
        "transformer",
        options,
        sample_size=SIDE,
        patch=PATCH,
    )
    decoder, channels = decoder_of(folder, model.config.in_channels // PATCH**2, options)
    tokens = TOKENS[bool(model.config.guidance_embeds)]
    if options.planned:
        embeddings = texts.blank(folder, prompts, model.config.joint_attention_dim, tokens=tokens)
        embeddings = embeddings.to(options.dtype)
        pooled = embeddings.new_empty(len(prompts), model.config.pooled_projection_dim)
    else:
        embeddings, pooled = _encode(folder, prompts, tokens, options.device, options.dtype)
    behind = [model.context_embedder(part) for part in embeddings.split(texts.PROMPTS_AT_ONCE)]
    denoiser = FluxDenoiser(
        model,
        torch.cat(behind),
        model.time_text_embed.text_embedder(pooled),
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _encode(
    folder: PipelineFolder,
    prompts: list[str],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns embeddings of T5 (len(prompts), tokens, width) and pooled ones of CLIP (len(prompts),
    w), both in ``dtype``, as ``FluxPipeline`` computes them.
    """
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}
    pipeline = texts.encoding_pipeline(folder, diffusers.FluxPipeline, encoders, device, dtype)
    embeddings, pooled = texts.encoded(
        lambda part: pipeline.encode_prompt(part, device=device, max_sequence_length=tokens)[:2],
        prompts,
    )
    return embeddings, pooled


FAMILIES = {
    "FluxPipeline": Family(
        _flux,
        needs=(
            "transformer",
            "vae",
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "scheduler",
        ),
        models=("transformer", "vae", "text_encoder", "text_encoder_2"),
        sized=True,
    )
}
