"""What a guided sample costs by the way its gradient is made, in FLOPs.

Everything derived from here is a limit or a ratio, never a measurement: FLOP ratios equal time
ratios only where every part runs at the same share of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dpfast.hardware.flops import Pass, count
from dpfast.planning.architectures import frozen, published, vit_b_16


@dataclass(frozen=True, kw_only=True)
class Work:
    """The parts of guided sampling with one generator at one resolution."""

    name: str
    denoiser: Pass
    decoder: Pass
    tiny: Pass
    learner: Pass


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a sample is made.

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

    def guidance(self, work: Work) -> float:
        """FLOPs that one guided step adds to an unguided one."""
        denoiser = {"extra": work.denoiser.both, "shared": work.denoiser.backward, "latent": 0.0}[
            self.gradient
        ]
        return denoiser + (work.tiny if self.tiny else work.decoder).both + work.learner.both

    def unguided(self, work: Work) -> float:
        """FLOPs of one unguided sample: the steps and the decoding of the image."""
        cfg_steps = self.steps if self.cfg_steps is None else self.cfg_steps
        return (self.steps + cfg_steps) * work.denoiser.forward + work.decoder.forward

    def total(self, work: Work) -> float:
        """FLOPs of one guided sample."""
        return self.unguided(work) + self.guided * self.guidance(work)

    def cost(self, work: Work) -> float:
        """A guided sample over an unguided one."""
        return self.total(work) / self.unguided(work)


PREDECESSOR = Method(gradient="extra", tiny=False)


def stable_diffusion_15(pixels: int) -> Work:
    """Stable Diffusion 1.5 with ViT-B/16 at 224 px as the learner."""
    return _work(f"Stable Diffusion 1.5, {pixels} px", "stable-diffusion-1.5", pixels)


def dit_xl_2(pixels: int = 256) -> Work:
    """DiT-XL/2 with learned sigma; decoders and learner as for Stable Diffusion 1.5, whose
    autoencoder it uses.
    """
    return _work(f"DiT-XL/2, {pixels} px", "dit-xl-2", pixels)


def _work(title: str, name: str, pixels: int) -> Work:
    pipeline = published(name, pixels)
    denoiser = pipeline.denoiser
    with torch.device("meta"):
        x, t, label = (
            torch.empty(1, *denoiser.sample_shape),
            torch.empty(()),
            torch.zeros(1, dtype=torch.int64),
        )
        learner, images = frozen(vit_b_16()), torch.empty(1, 3, 224, 224)
        return Work(
            name=title,
            denoiser=count(lambda x: denoiser(x, t, label), x),
            decoder=count(pipeline.decoder, x),
            tiny=count(pipeline.guidance_decoder, x),
            learner=count(lambda x: learner(x), images),
        )
