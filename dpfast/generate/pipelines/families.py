"""Model families: how the parts of each kind of pipeline folder become a denoiser and a decoder.

DiTPipeline               class ids; the class id after the last embedding row is the null class
StableDiffusionPipeline   1.x and 2.x; one prompt a class, the empty prompt is the null class
StableDiffusion3Pipeline  flow matching; prompts as above; the T5 encoder where the folder has it
DDIMPipeline, DDPMPipeline  pixels, unconditional or class ids

Adding a family: give ``dpfast.generate.models.denoiser`` a class with the call of its model, write
here the function that loads a folder's parts, and enter it in ``FAMILIES``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from dpfast.generate.models.decoder import (
    Decoder,
    IdentityDecoder,
    TinyDecoder,
    VaeDecoder,
    decoder_dtype,
)
from dpfast.generate.models.denoiser import (
    Denoiser,
    DiTDenoiser,
    PixelUNetDenoiser,
    TextTransformerDenoiser,
    TextUNetDenoiser,
)
from dpfast.generate.models.fused import quantise
from dpfast.generate.pipelines.attention import set_attention
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.pipelines.prompts import (
    class_prompts,
    encode_stable_diffusion,
    encode_stable_diffusion_3,
)
from dpfast.generate.solvers import load_scheduler, prediction_of

log = logging.getLogger(__name__)

CONVOLUTIONAL = (diffusers.UNet2DConditionModel, diffusers.UNet2DModel)


@dataclass(frozen=True)
class LoadOptions:
    """What the caller of ``Pipeline.from_pretrained`` chose, checked."""

    device: torch.device
    dtype: torch.dtype
    attention: str
    channels_last: bool
    fused: bool
    float8: bool  # of the linear layers, where dtype is of all else
    class_names: Sequence[str] | None
    prompt_template: str


@dataclass(frozen=True)
class LoadedParts:
    """What a family makes of a folder."""

    denoiser: Denoiser
    decoder: Decoder
    scheduler: Any
    class_names: tuple[str, ...]
    image_channels: int


def load(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    """Loads the parts of a folder.

    Raises ``InputError`` for a pipeline of no family and whatever its family refuses.
    """
    family = family_of(folder)
    folder.need(*family.needs)
    if options.float8:
        check_float8(folder)
    parts = family.load(folder, options)
    if options.float8:
        quantised, layers = into_float8(folder, parts.denoiser)
        log.info("float8: %d of %d linear layers of the denoiser", quantised, layers)
    return parts


def check_float8(folder: PipelineFolder) -> None:
    """Raises ``InputError`` for a pipeline whose linear layers run in 16 bits alone."""
    if not family_of(folder).float8:
        able = " and ".join(name for name, each in FAMILIES.items() if each.float8)
        raise folder.error(
            f"a {folder.kind} with dtype = 'float8', which is for {able}; use 'bfloat16'"
        )


def into_float8(folder: PipelineFolder, denoiser: Any) -> tuple[int, int]:
    """Lets the linear layers of a fused denoiser run in float8, and returns how many do, and of how
    many. Raises ``InputError`` where none can.
    """
    quantised, layers = quantise(denoiser.model)
    if not quantised:
        raise folder.error(
            "dtype = 'float8' finds no block whose linear layers take it (known to "
            "dpfast.generate.models.fused, widths that are multiples of 16); use 'bfloat16'"
        )
    return quantised, layers


def check(folder: PipelineFolder) -> None:
    """Raises ``InputError`` for a pipeline of no family, and where a file of weights is missing or
    cut short.

    Reads the headers of the files alone.
    """
    for part in family_of(folder).models:
        if folder.class_of(part) is not None:
            folder.check_weights(part)
    if (folder.path / "tiny_decoder").is_dir():
        folder.check_weights("tiny_decoder")


def tiny_decoder(folder: PipelineFolder, options: LoadOptions) -> Decoder | None:
    """The folder's ``tiny_decoder`` part, where there is one."""
    if not (folder.path / "tiny_decoder").is_dir():
        return None
    model = _autoencoder(folder, diffusers.AutoencoderTiny, "tiny_decoder", options)
    return TinyDecoder(model, fused=options.fused)


def _dit(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = _names(folder, options)
    scheduler = load_scheduler(folder.path, latent=True)
    model = _network(folder, diffusers.DiTTransformer2DModel, "transformer", options)
    if len(names) > model.config.num_embeds_ada_norm:
        raise folder.error(
            f"{len(names)} class names for a model of {model.config.num_embeds_ada_norm} classes"
        )
    decoder, channels = _decoder(folder, model.config.in_channels, options)
    steps = scheduler.config.num_train_timesteps
    denoiser = DiTDenoiser(
        model,
        classes=len(names),
        prediction=prediction_of(scheduler),
        timesteps=steps,
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _stable_diffusion(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = _names(folder, options)
    prompts = class_prompts(names, options.prompt_template)
    # as StableDiffusionPipeline sets every scheduler: old folders of this family name other values
    scheduler = load_scheduler(folder.path, latent=True, clip_sample=False, steps_offset=1)
    model = _network(folder, diffusers.UNet2DConditionModel, "unet", options)
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
    decoder, channels = _decoder(folder, model.config.in_channels, options)
    embeddings = encode_stable_diffusion(
        folder, prompts, device=options.device, dtype=options.dtype
    )
    denoiser = TextUNetDenoiser(
        model,
        embeddings,
        prediction=prediction_of(scheduler),
        timesteps=scheduler.config.num_train_timesteps,
        fused=options.fused,
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _stable_diffusion_3(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    names = _names(folder, options)
    prompts = class_prompts(names, options.prompt_template)
    scheduler = load_scheduler(folder.path, latent=True)
    if prediction_of(scheduler) != "flow":
        raise folder.error(
            f"scheduler {type(scheduler).__name__}: a {folder.kind} needs a flow-matching one"
        )
    model = _network(folder, diffusers.SD3Transformer2DModel, "transformer", options)
    decoder, channels = _decoder(folder, model.config.in_channels, options)
    embeddings, pooled = encode_stable_diffusion_3(
        folder, prompts, model, device=options.device, dtype=options.dtype
    )
    denoiser = TextTransformerDenoiser(
        model, embeddings, pooled, prediction="flow", fused=options.fused
    )
    return LoadedParts(denoiser, decoder, scheduler, names, channels)


def _pixel(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    scheduler = load_scheduler(folder.path, latent=False)
    if prediction_of(scheduler) == "flow":
        raise folder.error(
            f"scheduler {type(scheduler).__name__}: a {folder.kind} needs one with betas"
        )
    model = _network(folder, diffusers.UNet2DModel, "unet", options)
    config = model.config
    if config.sample_size is None:
        raise folder.error(
            "'unet' has no sample_size in its config.json; expected the images' height and width"
        )
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


@dataclass(frozen=True)
class Family:
    """What is known of a kind of pipeline folder.

    load: makes its parts. needs: the sub-folders without which it cannot be loaded. models: the
    parts with weights, where the folder has them. float8: whether its linear layers gain by it.
    """

    load: Callable[[PipelineFolder, LoadOptions], LoadedParts]
    needs: tuple[str, ...]
    models: tuple[str, ...]
    float8: bool = False


_PIXEL = Family(_pixel, needs=("unet", "scheduler"), models=("unet",))
FAMILIES = {
    "DiTPipeline": Family(
        _dit,
        needs=("transformer", "vae", "scheduler"),
        models=("transformer", "vae"),
        float8=True,
    ),
    "StableDiffusionPipeline": Family(
        _stable_diffusion,
        needs=("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
        models=("unet", "vae", "text_encoder"),
    ),
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
        float8=True,
    ),
    "DDIMPipeline": _PIXEL,
    "DDPMPipeline": _PIXEL,
}


def family_of(folder: PipelineFolder) -> Family:
    """The family of a folder. Raises ``InputError`` for a pipeline of none."""
    if folder.kind not in FAMILIES:
        raise folder.error(f"a {folder.kind}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[folder.kind]


def _names(folder: PipelineFolder, options: LoadOptions) -> tuple[str, ...]:
    names = folder.class_names(options.class_names)
    if names is None:
        raise folder.error(
            f"a {folder.kind} needs class names: pass class_names = [...], or put a list of them "
            "into the folder's class_names.json"
        )
    return names


def _network(folder: PipelineFolder, kind: Any, part: str, options: LoadOptions) -> Any:
    model = folder.model(kind, part, device=options.device, dtype=options.dtype)
    if kind in CONVOLUTIONAL:
        model = _in_format(model, options)
    return set_attention(model, options.attention)


def _autoencoder(folder: PipelineFolder, kind: Any, part: str, options: LoadOptions) -> Any:
    dtype = decoder_dtype(folder.config(part), options.dtype)
    return folder.model(kind, part, device=options.device, dtype=dtype)


def _in_format(model: Any, options: LoadOptions) -> Any:
    nhwc = options.channels_last or options.fused
    return model.to(memory_format=torch.channels_last) if nhwc else model


def _decoder(
    folder: PipelineFolder, latent_channels: int, options: LoadOptions
) -> tuple[Decoder, int]:
    """The decoder of the part "vae" and the channels of its images."""
    named = folder.class_of("vae")
    if named not in ("AutoencoderKL", "AutoencoderTiny"):
        raise folder.error(f"'vae' is a {named}; expected an AutoencoderKL or an AutoencoderTiny")
    model = _in_format(_autoencoder(folder, getattr(diffusers, named), "vae", options), options)
    if model.config.latent_channels != latent_channels:
        raise folder.error(
            f"the denoiser takes {latent_channels} channels and 'vae' has "
            f"{model.config.latent_channels} latent ones; expected as many"
        )
    decoder = VaeDecoder if named == "AutoencoderKL" else TinyDecoder
    return decoder(model, fused=options.fused), int(model.config.out_channels)
