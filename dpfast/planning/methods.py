"""The FLOPs of a guided sample by the way its gradient is made.

Everything derived from here is a limit or a ratio, never a measurement: FLOP ratios equal time
ratios only where every part runs at the same share of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dpfast.generate.pipelines import Pipeline
from dpfast.hardware.flops import Passes, count_passes
from dpfast.planning.architectures import META, frozen, published, vit_b_16


@dataclass(frozen=True, kw_only=True)
class PartFlops:
    """The parts of guided sampling with one generator at one resolution."""

    name: str
    denoiser: Passes
    decoder: Passes
    tiny: Passes
    learner: Passes


@dataclass(frozen=True, kw_only=True)
class Method:
    """The way in which a sample is made.

    guided: number of guided steps; cfg_steps: steps with classifier-free guidance, None: all.
    gradient: "extra" runs a denoiser forward of its own on a guided step, "shared" differentiates
    the conditional one of classifier-free guidance, "latent" does not differentiate the denoiser.
    tiny: the decoder in the gradient.
    """

    steps: int = 20
    guided: int = 4
    cfg_steps: int | None = None
    gradient: Literal["extra", "shared", "latent"] = "shared"
    tiny: bool = True

    def guidance(self, parts: PartFlops) -> float:
        """Returns FLOPs that one guided step adds to an unguided one."""
        denoiser = {"extra": parts.denoiser.both, "shared": parts.denoiser.backward, "latent": 0.0}[
            self.gradient
        ]
        return denoiser + (parts.tiny if self.tiny else parts.decoder).both + parts.learner.both

    def unguided(self, parts: PartFlops) -> float:
        """Returns FLOPs of one unguided sample: the steps and the decoding of the image."""
        cfg_steps = self.steps if self.cfg_steps is None else self.cfg_steps
        return (self.steps + cfg_steps) * parts.denoiser.forward + parts.decoder.forward

    def total(self, parts: PartFlops) -> float:
        """Returns FLOPs of one guided sample."""
        return self.unguided(parts) + self.guided * self.guidance(parts)

    def ratio(self, parts: PartFlops) -> float:
        """Returns a guided sample over an unguided one."""
        return self.total(parts) / self.unguided(parts)


PREDECESSOR = Method(gradient="extra", tiny=False)


def stable_diffusion_15(pixels: int) -> PartFlops:
    """Returns the parts of Stable Diffusion 1.5 with ViT-B/16 at 224 px as the learner."""
    return _parts(f"Stable Diffusion 1.5, {pixels} px", "stable-diffusion-1.5", pixels)


def stable_diffusion_21(pixels: int = 768) -> PartFlops:
    """Returns the parts of Stable Diffusion 2.1 with the same learner."""
    return _parts(f"Stable Diffusion 2.1, {pixels} px", "stable-diffusion-2.1", pixels)


def stable_diffusion_xl(pixels: int = 1024) -> PartFlops:
    """Returns the parts of Stable Diffusion XL 1.0, the base, with the same learner."""
    return _parts(f"Stable Diffusion XL, {pixels} px", "stable-diffusion-xl", pixels)


def pixart_sigma(pixels: int = 1024) -> PartFlops:
    """Returns the parts of PixArt-Sigma XL/2 with the same learner, prompts of all 300 tokens."""
    return _parts(f"PixArt-Sigma, {pixels} px", "pixart-sigma", pixels)


def sana(pixels: int = 1024) -> PartFlops:
    """Returns the parts of SANA 1.6B with the same learner; it has no tiny decoder, so "tiny" is
    its full one.
    """
    return _parts(f"SANA 1.6B, {pixels} px", "sana-1.6b", pixels)


def flux(kind: str = "dev", pixels: int = 1024) -> PartFlops:
    """Returns the parts of FLUX.1 "dev" or "schnell" with the same learner."""
    return _parts(f"FLUX.1 {kind}, {pixels} px", f"flux-{kind}", pixels)


def dit_xl_2(pixels: int = 256) -> PartFlops:
    """Returns the parts of DiT-XL/2 with learned sigma; decoders and learner as for Stable
    Diffusion 1.5, whose autoencoder it uses.
    """
    return _parts(f"DiT-XL/2, {pixels} px", "dit-xl-2", pixels)


def _parts(title: str, name: str, pixels: int) -> PartFlops:
    return beside_vit(title, published(name, pixels))


def beside_vit(title: str, pipeline: Pipeline) -> PartFlops:
    """Returns the parts of a pipeline on the meta device, with ViT-B/16 as the learner."""
    with META:
        learner = frozen(vit_b_16(channels=pipeline.image_channels))
    return parts_of(title, pipeline, learner, 224)


def parts_of(title: str, pipeline: Pipeline, learner: nn.Module, side: int) -> PartFlops:
    """Returns the parts of a pipeline and a learner of images of ``side`` pixels, both on the meta
    device.
    """
    denoiser = pipeline.denoiser
    with META:
        x = torch.empty(1, *denoiser.sample_shape)
        t = torch.empty(())
        label = torch.zeros(1, dtype=torch.int64)
        images = torch.empty(1, pipeline.image_channels, side, side)
        return PartFlops(
            name=title,
            denoiser=count_passes(lambda x: denoiser(x, t, label), x),
            decoder=count_passes(pipeline.decoder, x),
            tiny=count_passes(pipeline.guidance_decoder, x),
            learner=count_passes(lambda x: learner(x), images),
        )
