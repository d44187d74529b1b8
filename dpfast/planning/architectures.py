"""Generators without weights, on the meta device: of a pipeline folder's configurations, or of
published ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from dpfast.config import Generator
from dpfast.errors import InputError
from dpfast.generate.from_recipe import class_names, folder_of, prompts_of, resized
from dpfast.generate.models.decoder import Decoder, TinyDecoder, VaeDecoder, decoder_dtype
from dpfast.generate.models.fused import quantise
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.families import check_float8, check_size, into_float8
from dpfast.generate.pipelines.families.common import sized
from dpfast.generate.pipelines.families.dit import DiTDenoiser
from dpfast.generate.pipelines.families.stable_diffusion import TextUNetDenoiser
from dpfast.generate.pipelines.folder import TINY, PipelineFolder
from dpfast.generate.pipelines.pipeline import DTYPES, FLOAT8
from dpfast.generate.solvers import load_scheduler, prediction_of
from dpfast.learn.models import build_learner

META = torch.device("meta")
TOKENS = 77  # of CLIP's text encoder

# The published configurations, as their repositories' config.json say: stable-diffusion-v1-5 (UNet
# of 859.5 M parameters) and facebook/DiT-XL-2-256 (675 M); both use the autoencoder of Stable
# Diffusion (83.7 M).
SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
DIT_XL_2: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
BETAS: dict[str, dict[str, Any]] = {
    "stable-diffusion-1.5": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    "dit-xl-2": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
}
PIXELS = {
    "stable-diffusion-1.5": 512,
    "dit-xl-2": 256,
}  # the published names, and what they were trained at


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)


def published(
    name: str,
    pixels: int | None = None,
    *,
    classes: int = 1000,
    dtype: torch.dtype = torch.float32,
    device: torch.device = META,
    fused: bool = False,
    changes: Mapping[str, dict[str, Any]] | None = None,
) -> Pipeline:
    """A published architecture with the tiny decoder of its autoencoder (TAESD, 1.22 M parameters),
    weights at random.

    fused: as ``Pipeline.from_pretrained`` takes it; convolutions are then in channels_last memory.
    dtype, device: of all weights. On the meta device, where there are none, the solver's tables,
    which are numbers, are on the CPU. changes: of the configurations of "denoiser", "vae" and
    "tiny", for one that is not of the published size.

    Raises ``InputError`` for another name than those of ``PIXELS``.
    """
    if name not in PIXELS:
        raise InputError(
            f"pipeline = {name!r}: no folder, and no published architecture; those are "
            f"{', '.join(PIXELS)}"
        )
    side = (pixels or PIXELS[name]) // 8
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **BETAS[name])
    layout: Any = {"memory_format": torch.channels_last} if fused else {}
    changed: dict[str, dict[str, Any]] = {"denoiser": {}, "vae": {}, "tiny": {}} | dict(
        changes or {}
    )
    is_dit = name == "dit-xl-2"
    config = (DIT_XL_2 if is_dit else SD15) | changed["denoiser"]
    with device, _default(dtype):
        kind = diffusers.DiTTransformer2DModel if is_dit else diffusers.UNet2DConditionModel
        # Weights are drawn before anything is made of them: a seed gives the same in every form.
        network = frozen(kind(sample_size=side, **config))
        prompts = None
        if not is_dit:
            prompts = torch.randn(classes + 1, TOKENS, config["cross_attention_dim"])
        vae = diffusers.AutoencoderKL(**VAE | changed["vae"]).to(**layout)
        small = diffusers.AutoencoderTiny(**changed["tiny"])
        denoiser: Any
        if prompts is None:
            denoiser = DiTDenoiser(
                network,
                classes=classes,
                prediction="epsilon",
                timesteps=scheduler.config.num_train_timesteps,
                fused=fused,
            )
        else:
            denoiser = TextUNetDenoiser(
                network.to(**layout), prompts, prediction="epsilon", timesteps=1000, fused=fused
            )
        decoder: Decoder = VaeDecoder(vae, fused=fused)
        tiny: Decoder = TinyDecoder(small, fused=fused)
    names = tuple(f"class {i}" for i in range(classes))
    placed = torch.device("cpu") if device == META else device
    return Pipeline(Path(name), denoiser, decoder, tiny, scheduler, names, 3, placed)


def pipeline_of(generator: Generator) -> Pipeline:
    """The pipeline of a recipe's [generator], with its classes and its size of images. Raises
    ``InputError``.
    """
    names = class_names(generator)
    is_published = generator.pipeline in PIXELS and not Path(generator.pipeline).is_dir()
    source = generator.pipeline if is_published else folder_of(generator)
    prompts = None
    if generator.prompts:
        own = None if isinstance(source, str) else source.class_names(None)
        prompts = sum(map(len, prompts_of(generator).of(names or own or ())))
    return resized(
        without_weights(
            source,
            classes=None if names is None else len(names),
            dtype=DTYPES[generator.dtype],
            float8=generator.dtype == FLOAT8,
            height=generator.height,
            width=generator.width,
            prompts=prompts,
        ),
        generator.image_size,
    )


def without_weights(
    source: str | Path | PipelineFolder,
    *,
    classes: int | None = None,
    dtype: torch.dtype = torch.float32,
    float8: bool = False,
    height: int = 0,
    width: int = 0,
    prompts: int | None = None,
) -> Pipeline:
    """The pipeline of a folder or an embedded asset, from its configurations alone; of a published
    name otherwise.

    classes: where the folder does not name its own. height, width: of the images in pixels, as
    ``Pipeline.from_pretrained`` takes them. prompts: of all classes; None: one a
    class. float8: with fused blocks, whose linear layers
    run in float8 where they can. Raises ``InputError`` for a folder of another kind than
    ``DiTPipeline`` and ``StableDiffusionPipeline``, or in float8 than the first.
    """
    if isinstance(source, str) and source in PIXELS and not Path(source).is_dir():
        pixels = _square(source, height, width)
        made = published(source, pixels, classes=classes or 1000, dtype=dtype, fused=float8)
        if float8 and not quantise(made.denoiser.model)[0]:  # type: ignore[attr-defined]
            raise InputError(
                f"pipeline = {str(source)!r}: a UNet with dtype = 'float8', which is for "
                "transformers; use 'bfloat16'"
            )
        return made
    folder = source if isinstance(source, PipelineFolder) else PipelineFolder(source)
    if folder.kind not in ("DiTPipeline", "StableDiffusionPipeline"):
        raise folder.error(
            f"a {folder.kind}; a plan takes a DiTPipeline or a StableDiffusionPipeline"
        )
    if float8:
        check_float8(folder)
    check_size(folder, height, width)
    given = None if classes is None else [f"class {i}" for i in range(classes)]
    names = (folder.class_names(None) if given is None else tuple(given)) or ()
    if not names:
        raise folder.error("does not name its classes; say class_names")
    scheduler = load_scheduler(folder.path, latent=True)
    denoiser: Any
    with META, _default(dtype):
        if folder.kind == "DiTPipeline":
            dit = _from_config(folder, diffusers.DiTTransformer2DModel, "transformer")
            steps = scheduler.config.num_train_timesteps
            denoiser = DiTDenoiser(
                dit,
                classes=len(names),
                prediction=prediction_of(scheduler),
                timesteps=steps,
                fused=float8,
            )
            if float8:
                into_float8(folder, denoiser)
        else:
            unet = _from_config(folder, diffusers.UNet2DConditionModel, "unet")
            sized(folder, unet, height, width)
            rows = (len(names) if prompts is None else prompts) + 1
            embeddings = torch.empty(rows, TOKENS, unet.config.cross_attention_dim)
            denoiser = TextUNetDenoiser(unet, embeddings, prediction=prediction_of(scheduler))
        kind = getattr(diffusers, str(folder.class_of("vae")))
        vae = _autoencoder(folder, kind, "vae", dtype)
        decoder: Decoder = VaeDecoder(vae) if kind is diffusers.AutoencoderKL else TinyDecoder(vae)
        tiny = decoder
        if folder.has(TINY):
            model = _autoencoder(folder, diffusers.AutoencoderTiny, TINY, dtype)
            tiny = TinyDecoder(model)
    channels = int(vae.config.out_channels)
    return Pipeline(
        folder.path, denoiser, decoder, tiny, scheduler, names, channels, torch.device("cpu")
    )


def _square(name: str, height: int, width: int) -> int | None:
    """The side of the images of a published architecture, None for its own."""
    if height != width:
        raise InputError(
            f"height = {height}: the published {name} is counted for squares alone; say width = "
            f"{height} as well, or name a folder"
        )
    return height or None


def _autoencoder(folder: PipelineFolder, kind: Any, part: str, dtype: torch.dtype) -> Any:
    with _default(decoder_dtype(folder.config(part), dtype)):
        return _from_config(folder, kind, part)


def _from_config(folder: PipelineFolder, kind: Any, part: str) -> Any:
    folder.need(part)
    return frozen(kind.from_config(kind.load_config(folder.place(part))))


def vit_b_16(classes: int = 1000) -> nn.Module:
    """ViT-B/16 at 224 px (Dosovitskiy et al. 2020), on the device of the context."""
    return build_learner("transformers:ViTForImageClassification", classes=classes, channels=3)
