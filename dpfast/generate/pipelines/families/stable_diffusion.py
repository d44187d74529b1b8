"""``StableDiffusionPipeline``: 1.x and 2.x; one prompt a class, the empty one is the null class.
``LatentConsistencyModelPipeline``: the same, distilled; its UNet embeds the scale of guidance.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.generate.models.denoiser import PromptDenoiser
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


class TextUNetDenoiser(PromptDenoiser):
    """``UNet2DConditionModel`` of Stable Diffusion over prompts' embeddings.

    ``timesteps``: of the training, where those of a table are among them; a fused model then
    tabulates its time.
    ``added``: (classes + 1, E), what a prompt adds to the embedding of the time, None where it is
    nothing.

    A model with ``time_cond_proj_dim`` embeds the scale of guidance (``ScaleRows``).
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: Tensor,
        *,
        prediction: Prediction,
        timesteps: int | None = None,
        added: Tensor | None = None,
        fused: bool = False,
    ) -> None:
        config: Any = model.config
        width = config.time_cond_proj_dim
        super().__init__(
            model,
            embeddings,
            prediction=prediction,
            embeds_scale=width is not None,
            fused=fused,
        )
        self.added = added
        self._scales = None if width is None else ScaleRows(width, embeddings)
        if added is not None:
            self.model.get_aug_embed = _given_rows
        if self.embeds_scale or added is not None:
            timesteps = None
        self._text = share_conditions(model, timesteps) if fused else None
        self.whole_timesteps = self._text is not None and timesteps is not None

    def _predict(self, x: Tensor, timesteps: Tensor, labels: Tensor, *scale: Tensor) -> Tensor:
        text = self.embeddings.index_select(0, labels)
        text = text if self._text is None else self._text(text)
        rows = None if self.added is None else {"rows": self.added.index_select(0, labels)}
        return self.model(
            x,
            timesteps,
            encoder_hidden_states=text,
            timestep_cond=None if self._scales is None else self._scales(*scale),
            added_cond_kwargs=rows,
        ).sample


def _given_rows(*, added_cond_kwargs: dict[str, Tensor], **_: Any) -> Tensor:
    """Stands in the place of the layers behind a prompt's pooled embedding, whose results are a
    table.
    """
    return added_cond_kwargs["rows"]


class ScaleRows:
    """A map from scales of guidance, 0-d, to their embeddings (1, width), as diffusers' pipelines
    of distilled models compute them: sinusoids of 1000 (scale - 1). No scale is 1.

    like: has their dtype and device.
    """

    def __init__(self, width: int, like: Tensor) -> None:
        half = width // 2
        steps = torch.arange(half, dtype=torch.float32, device=like.device)
        self.frequencies = torch.exp(steps * -(math.log(10000.0) / max(1, half - 1)))
        self.one = torch.ones((), device=like.device)
        self.dtype, self.odd = like.dtype, width % 2

    def __call__(self, scale: Tensor | None = None) -> Tensor:
        above = (self.one if scale is None else scale.float()).reshape(1, 1) - 1
        angles = above * 1000.0 * self.frequencies
        rows = torch.cat([angles.sin(), angles.cos()], dim=1)
        return F.pad(rows, (0, self.odd)).to(self.dtype)


def _stable_diffusion(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = names_of(folder, options)
    prompts = options.prompts.texts(names)
    # as StableDiffusionPipeline sets every scheduler: old folders of this family name other values
    scheduler = load_scheduler(folder.path, latent=True, clip_sample=False, steps_offset=1)
    model = network(folder, diffusers.UNet2DConditionModel, "unet", options)
    prompts_alone(folder, model, "addition_embed_type")
    decoder, channels = decoder_of(folder, model.config.in_channels, options)
    if options.planned:
        width = model.config.cross_attention_dim
        embeddings = texts.blank(folder, prompts, width).to(options.dtype)
    else:
        embeddings = _encode(folder, prompts, device=options.device, dtype=options.dtype)
    denoiser = TextUNetDenoiser(
        model,
        embeddings,
        prediction=prediction_of(scheduler),
        timesteps=scheduler.config.num_train_timesteps,
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def prompts_alone(folder: PipelineFolder, model: Any, *more: str) -> None:
    """Raises ``InputError`` for a UNet that is conditioned on more than prompts; ``more``: options
    that say so beside those of classes.
    """
    for option in ("class_embed_type", "num_class_embeds", *more):
        if model.config.get(option) is not None:
            raise folder.error(
                f"'unet' has {option} = {model.config[option]!r}; expected a UNet of prompts alone"
            )


def _encode(
    folder: PipelineFolder, prompts: list[str], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Returns embeddings (len(prompts), tokens, width) in ``dtype``, as ``StableDiffusionPipeline``
    computes them.
    """
    pipeline = texts.encoding_pipeline(
        folder,
        diffusers.StableDiffusionPipeline,
        {"text_encoder": "CLIPTextModel"},
        device,
        dtype,
        requires_safety_checker=False,
    )
    (embeddings,) = texts.encoded(
        lambda part: pipeline.encode_prompt(part, device, 1, False)[:1], prompts
    )
    return embeddings


_STABLE_DIFFUSION = Family(
    _stable_diffusion,
    needs=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    models=("unet", "vae", "text_encoder"),
    sized=True,
)
FAMILIES = {
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "LatentConsistencyModelPipeline": _STABLE_DIFFUSION,
}
