"""Generators without weights, on the meta device: of a pipeline folder's configurations, or of
published ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from dpfast.generate.pipelines import Pipeline, families
from dpfast.generate.pipelines.families.dit import DiTDenoiser
from dpfast.generate.pipelines.families.stable_diffusion import TextUNetDenoiser
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.generate.pipelines.pipeline import DTYPES, FLOAT8
from dpfast.generate.pipelines.prompts import Prompts
from dpfast.generate.solvers import PREDICTIONS
from dpfast.learn.models import build_learner
from dpfast.ops.guided_step import Prediction

META = torch.device("meta")
TOKENS = 77  # of CLIP's text encoder

UNET = diffusers.UNet2DConditionModel
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
SCALED: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A generator as the files of its repository on the Hub describe it.

    pixels: that it was trained at. vae: what is not as in ``VAE``.
    """

    kind: Any
    config: dict[str, Any]
    pixels: int
    betas: dict[str, Any] = field(default_factory=lambda: SCALED)
    prediction: Prediction = "epsilon"
    vae: dict[str, Any] = field(default_factory=dict)


# stable-diffusion-v1-5 (UNet of 859.5 M parameters), stable-diffusion-2-1 (865.9 M),
# stable-diffusion-xl-base-1.0 (2,567.5 M) and facebook/DiT-XL-2-256 (675 M); all use the
# autoencoder of Stable Diffusion (83.7 M), that of XL trained anew.
ARCHITECTURES = {
    "stable-diffusion-1.5": Published(
        kind=UNET, config={"cross_attention_dim": 768, "attention_head_dim": 8}, pixels=512
    ),
    "stable-diffusion-2.1": Published(
        kind=UNET,
        config={
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        pixels=768,
        prediction="v",
    ),
    "stable-diffusion-xl": Published(
        kind=UNET,
        config={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        pixels=1024,
        vae={"scaling_factor": 0.13025, "force_upcast": True},
    ),
    "dit-xl-2": Published(
        kind=diffusers.DiTTransformer2DModel,
        config={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        pixels=256,
        betas={"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    ),
}
PIXELS = {name: about.pixels for name, about in ARCHITECTURES.items()}


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
    about = ARCHITECTURES[name]
    side = (pixels or about.pixels) // 8
    kinds = {kind: named for named, kind in PREDICTIONS.items()}
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=kinds[about.prediction],
        **about.betas,
    )
    layout: Any = {"memory_format": torch.channels_last} if fused else {}
    changed: dict[str, dict[str, Any]] = {"denoiser": {}, "vae": {}, "tiny": {}} | dict(
        changes or {}
    )
    config, of_vae = about.config | changed["denoiser"], VAE | about.vae | changed["vae"]
    with device, _default(dtype):
        # Weights are drawn before anything is made of them: a seed gives the same in every form.
        network = frozen(about.kind(sample_size=side, **config))
        prompts = added = None
        if about.kind is UNET:
            prompts = torch.randn(classes + 1, TOKENS, config["cross_attention_dim"])
        with _default(decoder_dtype(of_vae, dtype)):
            vae = diffusers.AutoencoderKL(**of_vae).to(**layout)
        small = diffusers.AutoencoderTiny(**changed["tiny"])
        if config.get("addition_embed_type") is not None:
            added = torch.randn(classes + 1, network.time_embedding.linear_2.out_features)
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
                network.to(**layout),
                prompts,
                prediction=about.prediction,
                timesteps=1000,
                added=added,
                fused=fused,
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
    ``Pipeline.from_pretrained`` takes them. prompts: of all classes; None: one a class. float8:
    with fused blocks, whose linear layers run in float8 where they can. Raises ``InputError`` as
    ``Pipeline.from_pretrained`` does, and for images of a published name that are no squares.
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
    names = folder.class_names(None) if classes is None else _numbered(classes)
    # a class a prompt, as many rows of embeddings as a class of several prompts has
    asked = names if prompts is None else _numbered(prompts)
    options = families.LoadOptions(
        device=META,
        dtype=dtype,
        attention="sdpa",
        channels_last=False,
        fused=float8,
        float8=float8,
        class_names=asked,
        prompts=Prompts(),
        height=height,
        width=width,
    )
    parts = families.load(folder, options)
    denoiser: Any = parts.denoiser
    if names and prompts is not None:
        denoiser.classes = len(names)
    return Pipeline(
        folder.path,
        denoiser,
        parts.decoder,
        families.tiny_decoder(folder, options) or parts.decoder,
        parts.scheduler,
        names or parts.class_names,
        parts.image_channels,
        torch.device("cpu"),
    )


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(count))


def _square(name: str, height: int, width: int) -> int | None:
    """The side of the images of a published architecture, None for its own."""
    if height != width:
        raise InputError(
            f"height = {height}: the published {name} is counted for squares alone; say width = "
            f"{height} as well, or name a folder"
        )
    return height or None


def vit_b_16(classes: int = 1000) -> nn.Module:
    """ViT-B/16 at 224 px (Dosovitskiy et al. 2020), on the device of the context."""
    return build_learner("transformers:ViTForImageClassification", classes=classes, channels=3)
