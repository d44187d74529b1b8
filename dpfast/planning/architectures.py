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
from torch import Tensor, nn

from dpfast.config import Generator
from dpfast.errors import InputError
from dpfast.generate.from_recipe import class_names, folder_of, prompts_of, resized
from dpfast.generate.models.decoder import (
    Decoder,
    DeepCompressionDecoder,
    TinyDecoder,
    VaeDecoder,
    decoder_dtype,
)
from dpfast.generate.models.fused import quantise
from dpfast.generate.pipelines import Pipeline, families
from dpfast.generate.pipelines.families.dit import DiTDenoiser
from dpfast.generate.pipelines.families.flux import TOKENS as FLUX_TOKENS
from dpfast.generate.pipelines.families.flux import FluxDenoiser
from dpfast.generate.pipelines.families.pixart import TOKENS as PIXART_TOKENS
from dpfast.generate.pipelines.families.pixart import PixArtDenoiser
from dpfast.generate.pipelines.families.sana import TOKENS as SANA_TOKENS
from dpfast.generate.pipelines.families.sana import SanaDenoiser
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
DIT = diffusers.DiTTransformer2DModel
PIXART = diffusers.PixArtTransformer2DModel
SANA = diffusers.SanaTransformer2DModel
FLUX = diffusers.FluxTransformer2DModel
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_XL = VAE | {"scaling_factor": 0.13025, "force_upcast": True}
VAE_FLUX = VAE | {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
BLOCKS_DC = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
VAE_DC: dict[str, Any] = {
    "encoder_block_types": BLOCKS_DC,
    "decoder_block_types": BLOCKS_DC,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
SCALED: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
LINEAR: dict[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A generator as the files of its repository on the Hub describe it.

    pixels: that it was trained at, and ``scale`` of them to an element of its latents. flow: the
    scheduler of a model that matches one, in place of ``betas``. tokens: of a prompt. vae: of the
    full decoder, an ``AutoencoderDC`` where ``scale`` is 32. tiny: of the tiny one; None for none.
    """

    kind: Any
    config: dict[str, Any]
    pixels: int
    betas: dict[str, Any] = field(default_factory=lambda: SCALED)
    prediction: Prediction = "epsilon"
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    tiny: dict[str, Any] | None = field(default_factory=dict)
    scale: int = 8
    tokens: int = TOKENS
    flow: Any = None


def _flux(*, dev: bool) -> Published:
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    return Published(
        kind=FLUX,
        config={"guidance_embeds": dev},
        pixels=1024,
        prediction="flow",
        vae=VAE_FLUX,
        tiny={"latent_channels": 16},
        tokens=FLUX_TOKENS[dev],
        flow=diffusers.FlowMatchEulerDiscreteScheduler(**shift),
    )


# stable-diffusion-v1-5 (UNet of 859.5 M parameters), stable-diffusion-2-1 (865.9 M),
# stable-diffusion-xl-base-1.0 (2,567.5 M) and facebook/DiT-XL-2-256 (675 M); all use the
# autoencoder of Stable Diffusion (83.7 M), that of XL trained anew. PixArt-Sigma-XL-2-1024-MS
# (610.9 M) uses that of XL, Sana_1600M_1024px (1,604.5 M) dc-ae-f32c32-sana, FLUX.1 dev (11,901 M)
# and schnell (11,891 M) one of 16 channels.
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
        vae=VAE_XL,
    ),
    "dit-xl-2": Published(
        kind=DIT,
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
        betas=LINEAR,
    ),
    "pixart-sigma": Published(
        kind=PIXART,
        config={"interpolation_scale": 2, "caption_channels": 4096}
        | {"attention_bias": True, "use_additional_conditions": False},
        pixels=1024,
        betas=LINEAR,
        vae=VAE_XL,
        tokens=PIXART_TOKENS["PixArtSigmaPipeline"],
    ),
    "sana-1.6b": Published(
        kind=SANA,
        config={},
        pixels=1024,
        prediction="flow",
        vae=VAE_DC,
        tiny=None,
        scale=32,
        tokens=SANA_TOKENS,
        flow=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        ),
    ),
    "flux-dev": _flux(dev=True),
    "flux-schnell": _flux(dev=False),
}
PIXELS = {name: about.pixels for name, about in ARCHITECTURES.items()}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes ``dtype`` that of new floating-point tensors."""
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
    """Returns a published architecture with the tiny decoder of its autoencoder (TAESD, 1.22 M
    parameters) where there is one, weights at random.

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
    side = (pixels or about.pixels) // about.scale
    scheduler = about.flow or over_betas(about)
    layout: Any = {"memory_format": torch.channels_last} if fused else {}
    changed: dict[str, dict[str, Any]] = {"denoiser": {}, "vae": {}, "tiny": {}} | dict(
        changes or {}
    )
    config, of_vae = about.config | changed["denoiser"], about.vae | changed["vae"]
    with device, default_dtype(dtype):
        # Weights are drawn before anything is made of them: a seed gives the same in every form.
        network = frozen(
            about.kind(**config, **({} if about.kind is FLUX else {"sample_size": side}))
        )
        network.register_to_config(sample_size=side)
        width = _width(network)
        prompts: Any = None
        added: Any = None
        if width:
            prompts = torch.randn(classes + 1, about.tokens, width)
        of_dc = about.scale == 32
        with default_dtype(decoder_dtype(of_vae, dtype)):
            kind: Any = diffusers.AutoencoderDC if of_dc else diffusers.AutoencoderKL
            vae = kind(**of_vae).to(**layout)
        small = None
        if about.tiny is not None:
            small = diffusers.AutoencoderTiny(**(about.tiny | changed["tiny"]))
        if config.get("addition_embed_type") is not None:
            added = torch.randn(classes + 1, network.time_embedding.linear_2.out_features)
        elif about.kind is FLUX:
            added = torch.randn(classes + 1, width)
        denoiser: Any
        if prompts is None:
            denoiser = DiTDenoiser(
                network,
                classes=classes,
                prediction="epsilon",
                timesteps=scheduler.config.num_train_timesteps,
                fused=fused,
            )
        elif about.kind is UNET:
            denoiser = TextUNetDenoiser(
                network.to(**layout),
                prompts,
                prediction=about.prediction,
                timesteps=1000,
                added=added,
                fused=fused,
            )
        elif about.kind is FLUX:
            denoiser = FluxDenoiser(network, prompts, added, fused=fused)
        elif about.kind is SANA:
            denoiser = SanaDenoiser(network, prompts, _unmasked(prompts), fused=fused)
        else:
            denoiser = PixArtDenoiser(
                network,
                prompts,
                _unmasked(prompts),
                prediction=about.prediction,
                pixels=about.scale,
                fused=fused,
            )
        decoder: Decoder = (DeepCompressionDecoder if of_dc else VaeDecoder)(vae, fused=fused)
        tiny: Decoder = decoder if small is None else TinyDecoder(small, fused=fused)
    names = tuple(f"class {i}" for i in range(classes))
    placed = torch.device("cpu") if device == META else device
    return Pipeline(Path(name), denoiser, decoder, tiny, scheduler, names, 3, placed)


def over_betas(about: Published) -> Any:
    """Returns the scheduler of a published generator that does not match a flow."""
    kinds = {kind: named for named, kind in PREDICTIONS.items()}
    return diffusers.DDIMScheduler(
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=kinds[about.prediction],
        **about.betas,
    )


def _width(network: Any) -> int:
    """Returns the width of the prompts' embeddings that a denoiser keeps; 0 for a model of
    classes.
    """
    config = network.config
    if isinstance(network, UNET):
        return int(config.cross_attention_dim)
    return 0 if isinstance(network, DIT) else config.num_attention_heads * config.attention_head_dim


def _unmasked(prompts: Tensor) -> Tensor:
    """Returns the bias that attention adds at the tokens of prompts without padding."""
    return prompts.new_zeros(len(prompts), 1, prompts.shape[1])


def is_published(name: str) -> bool:
    """Tells whether it is the name of a published architecture, and no folder."""
    return name in PIXELS and not Path(name).is_dir()


def pipeline_of(generator: Generator) -> Pipeline:
    """Returns the pipeline of a recipe's [generator], with its classes and its size of images.
    Raises ``InputError``.
    """
    names = class_names(generator)
    source = generator.pipeline if is_published(generator.pipeline) else folder_of(generator)
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
    """Returns the pipeline of a folder or an embedded asset, from its configurations alone; of a
    published name otherwise.

    classes: where the folder does not name its own. height, width: of the images in pixels, as
    ``Pipeline.from_pretrained`` takes them. prompts: of all classes; None: one a class. float8:
    with fused blocks, whose linear layers run in float8 where they can. Raises ``InputError`` as
    ``Pipeline.from_pretrained`` does, and for images of a published name that are no squares.
    """
    if isinstance(source, str) and is_published(source):
        pixels = _square(source, height, width)
        made = published(source, pixels, classes=classes or 1000, dtype=dtype, fused=float8)
        if float8 and not quantise(made.denoiser.model)[0]:  # type: ignore[attr-defined]
            raise InputError(
                f"pipeline = {str(source)!r}: a model with dtype = 'float8', which is for "
                "a DiT and Stable Diffusion 3; use 'bfloat16'"
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
        families.tiny_decoder(folder, options, parts.denoiser) or parts.decoder,
        parts.scheduler,
        names or parts.class_names,
        parts.image_channels,
        torch.device("cpu"),
    )


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(count))


def _square(name: str, height: int, width: int) -> int | None:
    """Returns the side of the images of a published architecture, None for its own."""
    if height != width:
        raise InputError(
            f"height = {height}: the published {name} is counted for squares alone; say width = "
            f"{height} as well, or name a folder"
        )
    return height or None


def vit_b_16(classes: int = 1000, channels: int = 3) -> nn.Module:
    """Returns ViT-B/16 at 224 px (Dosovitskiy et al. 2020), on the device of the context."""
    model = "transformers:ViTForImageClassification"
    return build_learner(model, classes=classes, channels=channels)
