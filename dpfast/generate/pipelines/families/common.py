"""The parts that the families share: the options of a loader, what it gives, and the parts alike in
all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from dpfast.generate.models.decoder import (
    Decoder,
    DeepCompressionDecoder,
    TinyDecoder,
    VaeDecoder,
    decoder_dtype,
)
from dpfast.generate.models.denoiser import Denoiser
from dpfast.generate.pipelines.attention import set_attention
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.pipelines.prompts import Prompts
from dpfast.generate.solvers import load_scheduler, prediction_of

DECODERS: dict[str, Any] = {
    "AutoencoderKL": VaeDecoder,
    "AutoencoderDC": DeepCompressionDecoder,
    "AutoencoderTiny": TinyDecoder,
}
CONVOLUTIONAL = (diffusers.UNet2DConditionModel, diffusers.UNet2DModel)


@dataclass(frozen=True)
class LoadOptions:
    """The checked choices of the caller of ``Pipeline.from_pretrained``."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    channels_last: bool
    fused: bool
    float8: bool  # of the linear layers, where dtype is of all else
    class_names: Sequence[str] | None
    prompts: Prompts
    height: int  # of the images in pixels; 0: the model's own
    width: int

    @property
    def planned(self) -> bool:
        """True if the parts are wanted without weights, and prompts without their embeddings."""
        return self.device.type == "meta"


@dataclass(frozen=True)
class LoadedParts:
    """The parts that a family makes of a folder."""

    denoiser: Denoiser
    decoder: Decoder
    scheduler: Any
    class_names: tuple[str, ...]
    image_channels: int


@dataclass(frozen=True)
class Family:
    """The facts about a kind of pipeline folder.

    load: makes its parts. needs: the sub-folders without which it cannot be loaded. models: the
    parts with weights, where the folder has them. float8: whether its linear layers gain by it.
    sized: whether its images may have another height and width than it was trained at.
    """

    load: Callable[[PipelineFolder, LoadOptions], LoadedParts]
    needs: tuple[str, ...]
    models: tuple[str, ...]
    float8: bool = False
    sized: bool = False

    @property
    def prompted(self) -> bool:
        """True if it is asked by text."""
        return any(part.startswith("tokenizer") for part in self.needs)


def names_of(folder: PipelineFolder, options: LoadOptions) -> tuple[str, ...]:
    names = folder.class_names(options.class_names)
    if names is None:
        raise folder.error(
            f"a {folder.kind} needs class names: pass class_names = [...], or put a list of them "
            "into the folder's class_names.json"
        )
    return names


def flow_scheduler(folder: PipelineFolder) -> Any:
    """Returns the scheduler of a folder whose model matches a flow. Raises ``InputError`` for
    another.
    """
    scheduler = load_scheduler(folder.path, latent=True)
    if prediction_of(scheduler) != "flow":
        raise folder.error(
            f"scheduler {type(scheduler).__name__}: a {folder.kind} needs a flow-matching one"
        )
    return scheduler


def network(
    folder: PipelineFolder,
    kind: Any,
    part: str,
    options: LoadOptions,
    *,
    sample_size: int | None = None,
    patch: int | None = None,
) -> Any:
    """Returns the model that denoises, on its device and of the size of images that was asked for.

    sample_size, patch: of a model whose configuration does not say them.
    """
    model = folder.model(kind, part, device=options.device, dtype=options.dtype)
    if sample_size is not None:
        model.register_to_config(sample_size=sample_size)
    if model.config.sample_size is None:
        raise folder.error(
            f"{part!r} has no sample_size in its config.json; expected the height and width of "
            "what it denoises"
        )
    sized(folder, model, options.height, options.width, patch=patch)
    if kind in CONVOLUTIONAL:
        model = in_format(model, options)
    return set_attention(model, options.attention)


def pixels_of_latents(folder: PipelineFolder) -> int:
    """Returns pixels in the height, and in the width, of one element of the latents of the part
    "vae".
    """
    config = folder.config("vae")
    for blocks in ("encoder_block_out_channels", "block_out_channels"):
        if config.get(blocks):
            return 2 ** (len(config[blocks]) - 1)
    raise folder.error("'vae' has no block_out_channels in its config.json")


def sized(
    folder: PipelineFolder, model: Any, height: int, width: int, *, patch: int | None = None
) -> None:
    """Gives a model the sample_size of images of ``height`` x ``width`` pixels; 0: its own.

    Raises ``InputError`` for sides that its latents or patches do not divide, or that are beyond
    its table of positions.
    """
    if not (height or width):
        return
    config = model.config
    patch, scale = patch or int(config.get("patch_size") or 1), pixels_of_latents(folder)
    own = config.sample_size
    sides = [int(side) for side in ((own, own) if isinstance(own, int) else own)]
    most = int(config.get("pos_embed_max_size") or 0) * patch * scale
    for at, (name, pixels) in enumerate((("height", height), ("width", width))):
        if pixels % (scale * patch):
            raise folder.error(
                f"{name} = {pixels}: expected a multiple of {scale * patch}, the pixels of "
                f"{'an element' if patch == 1 else 'a patch'} of its latents"
            )
        if most and pixels > most:
            raise folder.error(f"{name} = {pixels}: expected at most {most}, its last position")
        sides[at] = pixels // scale or sides[at]
    model.register_to_config(sample_size=tuple(sides))


def autoencoder(folder: PipelineFolder, kind: Any, part: str, options: LoadOptions) -> Any:
    dtype = decoder_dtype(folder.config(part), options.dtype)
    return folder.model(kind, part, device=options.device, dtype=dtype)


def in_format(model: Any, options: LoadOptions) -> Any:
    nhwc = options.channels_last or options.fused
    return model.to(memory_format=torch.channels_last) if nhwc else model


def decoder_of(
    folder: PipelineFolder, latent_channels: int, options: LoadOptions
) -> tuple[Decoder, int]:
    """Returns the decoder of the part "vae" and the channels of its images."""
    named = str(folder.class_of("vae"))
    if named not in DECODERS:
        *others, last = DECODERS
        raise folder.error(f"'vae' is {named}; expected one of {', '.join(others)} and {last}")
    model = in_format(autoencoder(folder, getattr(diffusers, named), "vae", options), options)
    if model.config.latent_channels != latent_channels:
        raise folder.error(
            f"the denoiser takes {latent_channels} channels and 'vae' has "
            f"{model.config.latent_channels} latent ones; expected as many"
        )
    made = DECODERS[named](model, fused=options.fused)
    return made, int(model.config.get("out_channels") or model.config.in_channels)
