"""Model families: how the parts of each kind of pipeline folder become a denoiser and a decoder.

DiTPipeline               class ids; the class id after the last embedding row is the null class
StableDiffusionPipeline   1.x and 2.x; one prompt a class, the empty prompt is the null class
LatentConsistencyModelPipeline  the same, distilled, with the scale of guidance as an input
StableDiffusionXLPipeline  prompts as above, for two encoders; the base without the refiner
StableDiffusion3Pipeline  flow matching; prompts as above; the T5 encoder where the folder has it
FluxPipeline  dev, with the scale of guidance as an input, and schnell; packed latents
PixArtAlphaPipeline, PixArtSigmaPipeline  prompts of a T5 encoder
SanaPipeline  prompts of a Gemma encoder, a deep-compression autoencoder
DDIMPipeline, DDPMPipeline  pixels, unconditional or class ids

Adding a family is one file in this package and its test. The file holds a class of denoiser with
the call of its model (``dpfast.generate.models.denoiser.ModelDenoiser``), the function that loads a
folder's parts, made of those in ``common`` and, for text, of ``dpfast.generate.pipelines.prompts``,
and a table ``FAMILIES`` from the pipeline's class name to its ``Family``; every file here is read.
Its loader gives the parts without weights as well (``LoadOptions.planned``), which is what plans
and rehearsals count.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from typing import Any

import diffusers

from dpfast.generate.models.decoder import Decoder, TinyDecoder
from dpfast.generate.models.denoiser import Denoiser
from dpfast.generate.models.fused import quantise
from dpfast.generate.pipelines.families.common import (
    Family,
    LoadedParts,
    LoadOptions,
    autoencoder,
)
from dpfast.generate.pipelines.folder import TINY, PipelineFolder
from dpfast.generate.pipelines.prompts import Prompts

__all__ = ["FAMILIES", "LoadOptions", "check", "check_float8", "family_of", "into_float8", "load"]

log = logging.getLogger(__name__)

FAMILIES: dict[str, Family] = {}
for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    FAMILIES |= getattr(_module, "FAMILIES", {})


def load(folder: PipelineFolder, options: LoadOptions) -> LoadedParts:
    """Loads the parts of a folder; on the device meta of their configurations alone.

    Raises ``InputError`` for a pipeline of no family and whatever its family refuses.
    """
    family = family_of(folder)
    if not options.planned:
        folder.need(*family.needs)
        folder.check_variant(_with_weights(folder))
    if options.float8:
        check_float8(folder)
    check_prompts(folder, options.prompts, ())
    check_size(folder, options.height, options.width)
    parts = family.load(folder, options)
    if family.prompted:
        denoiser: Any = parts.denoiser
        denoiser.classes = len(parts.class_names)
        if options.prompts.negative and denoiser.null_label is None:
            raise folder.error(
                "negative_prompt: its model embeds the scale of guidance and has no prediction to "
                "lead away from; leave it out"
            )
        denoiser.rows = options.prompts.rows(parts.class_names, options.device)
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


def check_size(folder: PipelineFolder, height: int, width: int) -> None:
    """Raises ``InputError`` for a pipeline whose images have one size, and another is asked for."""
    name, pixels = ("height", height) if height else ("width", width)
    if pixels and not family_of(folder).sized:
        raise folder.error(
            f"{name} = {pixels}: a {folder.kind} makes images of its own size alone; leave it out, "
            "image_size changes them afterwards"
        )


def check_prompts(folder: PipelineFolder, prompts: Prompts, names: tuple[str, ...]) -> None:
    """Raises ``InputError`` for prompts of a pipeline that takes none, or that cannot be those of
    the classes ``names``.
    """
    if family_of(folder).prompted:
        if names:
            prompts.of(names)
    elif prompts.given:
        raise folder.error(f"a {folder.kind} takes no prompts; leave {prompts.given} out")


def check(folder: PipelineFolder) -> None:
    """Raises ``InputError`` for a pipeline of no family, and where a part or a file of weights is
    missing or cut short.

    Reads the headers of the files alone.
    """
    folder.need(*family_of(folder).needs)
    for part in _with_weights(folder):
        folder.check_weights(part)
    folder.check_variant(_with_weights(folder))
    if folder.has(TINY):
        folder.check_weights(TINY)
    _ = folder.loras


def _with_weights(folder: PipelineFolder) -> list[str]:
    """Returns the parts with weights that a folder was saved with."""
    return [part for part in family_of(folder).models if folder.class_of(part) is not None]


def tiny_decoder(
    folder: PipelineFolder, options: LoadOptions, denoiser: Denoiser
) -> Decoder | None:
    """Returns the folder's ``tiny_decoder`` part, where there is one."""
    if not folder.has(TINY):
        return None
    model = autoencoder(folder, diffusers.AutoencoderTiny, TINY, options)
    channels = denoiser.sample_shape[0]
    if model.config.latent_channels != channels:
        raise folder.error(
            f"the tiny decoder takes {model.config.latent_channels} channels and the denoiser has "
            f"{channels}; expected as many"
        )
    return TinyDecoder(model, fused=options.fused)


def family_of(folder: PipelineFolder) -> Family:
    """Returns the family of a folder. Raises ``InputError`` for a pipeline of none."""
    if folder.kind not in FAMILIES:
        raise folder.error(f"a {folder.kind}; expected one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[folder.kind]
