"""``SanaPipeline``: linear attention over latents of a deep-compression autoencoder, whose element
stands for 32 x 32 pixels, and prompts of a Gemma encoder.

A prompt goes behind the instruction that diffusers' pipeline gives the encoder, the empty or
negative one without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

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

TOKENS = 300  # of a prompt, as SanaPipeline cuts them


def instruction() -> list[str]:
    """Returns the lines that diffusers puts before a prompt, which need transformers."""
    call = inspect.signature(diffusers.SanaPipeline.__call__)
    lines: list[str] = call.parameters["complex_human_instruction"].default
    return lines


class SanaDenoiser(PromptDenoiser):
    """``SanaTransformer2DModel`` over prompts' embeddings behind the projection and the norm of
    captions, with what attention adds at each of their tokens, ``bias`` (classes + 1, 1, tokens).
    """

    def __init__(
        self, model: nn.Module, embeddings: Tensor, bias: Tensor, *, fused: bool = False
    ) -> None:
        super().__init__(model, embeddings, prediction="flow", fused=fused)
        self.bias = bias
        self.model.caption_projection = self.model.caption_norm = nn.Identity()  # behind both

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        return self.model(
            x,
            encoder_hidden_states=self.embeddings.index_select(0, labels),
            encoder_attention_mask=self.bias.index_select(0, labels),
            timestep=timesteps * self.model.config.timestep_scale,
        ).sample


@torch.no_grad()
def _sana(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    prompts = options.prompts.texts(names)
    scheduler = flow_scheduler(folder)
    model = network(folder, diffusers.SanaTransformer2DModel, "transformer", options)
    if model.config.guidance_embeds:
        raise folder.error(
            "'transformer' has guidance_embeds = True, as SANA-Sprint has it, which steps on a "
            "schedule of its own; expected False"
        )
    decoder, channels = decoder_of(folder, model.config.in_channels, options)
    if options.planned:
        width = model.config.caption_channels
        embeddings = texts.blank(folder, prompts, width, tokens=TOKENS).to(options.dtype)
        bias = embeddings.new_empty(len(prompts), 1, TOKENS)
    else:
        embeddings, bias = _encode(folder, prompts, device=options.device, dtype=options.dtype)
    behind = [
        model.caption_norm(model.caption_projection(part))
        for part in embeddings.split(texts.PROMPTS_AT_ONCE)
    ]
    denoiser = SanaDenoiser(model, torch.cat(behind), bias, fused=options.fused)
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _encode(
    folder: PipelineFolder, prompts: list[str], *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns embeddings (len(prompts), tokens, width) and what attention adds at their tokens,
    both in ``dtype``, as ``SanaPipeline`` computes them.
    """
    pipeline = texts.encoding_pipeline(
        folder, diffusers.SanaPipeline, {"text_encoder": "Gemma2Model"}, device, dtype
    )

    def encode(part: list[str], before: list[str] | None) -> Sequence[Tensor]:
        return pipeline.encode_prompt(
            part,
            False,
            device=device,
            max_sequence_length=TOKENS,
            complex_human_instruction=before,
        )[:2]

    *asked, negative = prompts
    tables = texts.encoded(lambda part: encode(part, instruction()), asked)
    last = encode([negative], None)
    embeddings, mask = (torch.cat(pair) for pair in zip(tables, last, strict=True))
    return texts.without_padding(embeddings, mask)


FAMILIES = {
    "SanaPipeline": Family(
        _sana,
        needs=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
        models=("transformer", "vae", "text_encoder"),
        sized=True,
    )
}
