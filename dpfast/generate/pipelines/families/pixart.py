"""``PixArtAlphaPipeline`` and ``PixArtSigmaPipeline``: a transformer over prompts of a T5 encoder.

Prompts are taken in lower case and otherwise as they are. diffusers' ``clean_caption``, which takes
punctuation and links out of them where beautifulsoup4 and ftfy are installed, is off.
"""

from __future__ import annotations

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
    names_of,
    network,
    pixels_of_latents,
)
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.solvers import load_scheduler, prediction_of
from dpfast.ops.guided_step import Prediction

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # of a prompt, as they cut them


class PixArtDenoiser(PromptDenoiser):
    """``PixArtTransformer2DModel`` over prompts' embeddings behind the projection of captions, with
    what attention adds at each of their tokens, ``bias`` (classes + 1, 1, tokens).

    ``pixels`` are those of an element of the latents, for a model that is told the size of the
    image.
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: Tensor,
        bias: Tensor,
        *,
        prediction: Prediction,
        pixels: int,
        fused: bool = False,
    ) -> None:
        super().__init__(model, embeddings, prediction=prediction, fused=fused)
        self.bias = bias
        self.model.caption_projection = None  # the table lies behind it
        self.size: dict[str, Tensor] | None = None
        if self.model.use_additional_conditions:
            height, width = (pixels * side for side in self.sample_shape[1:])
            self.size = {
                "resolution": embeddings.new_tensor([[height, width]]),
                "aspect_ratio": embeddings.new_tensor([[height / width]]),
            }

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
        size = self.size or {}
        return self.model(
            x,
            encoder_hidden_states=self.embeddings.index_select(0, labels),
            encoder_attention_mask=self.bias.index_select(0, labels),
            timestep=timesteps,
            added_cond_kwargs={
                name: size[name].expand(len(x), -1) if size else None
                for name in ("resolution", "aspect_ratio")
            },
        ).sample


@torch.no_grad()
def _pixart(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    prompts = options.prompts.texts(names)
    scheduler = load_scheduler(folder.path, latent=True)
    model = network(folder, diffusers.PixArtTransformer2DModel, "transformer", options)
    if model.config.caption_channels is None:
        raise folder.error("'transformer' has caption_channels = None; expected a width")
    decoder, channels = decoder_of(folder, model.config.in_channels, options)
    if options.planned:
        width, tokens = model.config.caption_channels, TOKENS[folder.kind]
        embeddings = texts.blank(folder, prompts, width, tokens=tokens).to(options.dtype)
        bias = embeddings.new_empty(len(prompts), 1, tokens)
    else:
        embeddings, bias = _encode(folder, prompts, device=options.device, dtype=options.dtype)
    projected = [model.caption_projection(part) for part in embeddings.split(texts.PROMPTS_AT_ONCE)]
    denoiser = PixArtDenoiser(
        model,
        torch.cat(projected),
        bias,
        prediction=prediction_of(scheduler),
        pixels=pixels_of_latents(folder),
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _encode(
    folder: PipelineFolder, prompts: list[str], *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns embeddings (len(prompts), tokens, width) and what attention adds at their tokens,
    both in ``dtype``, as the folder's pipeline computes them.
    """
    kind = getattr(diffusers, folder.kind)
    pipeline = texts.encoding_pipeline(
        folder, kind, {"text_encoder": "T5EncoderModel"}, device, dtype
    )
    tokens = TOKENS[folder.kind]
    embeddings, mask = texts.encoded(
        lambda part: pipeline.encode_prompt(part, False, device=device, max_sequence_length=tokens)[
            :2
        ],
        prompts,
    )
    return texts.without_padding(embeddings, mask)


_PIXART = Family(
    _pixart,
    needs=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
    models=("transformer", "vae", "text_encoder"),
    sized=True,
)
FAMILIES = dict.fromkeys(TOKENS, _PIXART)
