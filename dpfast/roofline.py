"""What a sample costs in FLOPs, and how many samples a second a device's peak allows.

Models are built on the meta device from their published configurations and counted by torch's ``FlopCounterMode``: no
weights, no arithmetic, so a laptop counts Stable Diffusion in seconds. A multiplication and its addition count as two;
norms, activations and softmax do not count. Everything derived from here is a limit or a ratio, never a measurement:
FLOP ratios equal time ratios only where every part runs at the same share of the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 tensor-core FLOP/s and memory bytes/s of the makers' data sheets (SXM modules).
PEAKS = {
    "A100": (312e12, 2.04e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8e12),
}


@dataclass(frozen=True)
class Pass:
    """FLOPs of one sample: forward, and backward to the input alone (frozen weights)."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attentions in an eager ``call``, on any device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def count(function: Callable[[Tensor], Tensor], x: Tensor) -> Pass:
    """The passes of ``function`` at a batch ``x`` (B, ...) of floating type, for one sample."""
    x = x.detach().requires_grad_(True)
    kept: list[Tensor] = []
    with torch.enable_grad():
        forward = flops(lambda: kept.append(function(x)))
        backward = flops(lambda: kept[0].backward(torch.ones_like(kept[0])))
    return Pass(forward / len(x), backward / len(x))


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
    gradient: "extra" runs a denoiser forward of its own on a guided step, "shared" differentiates the conditional one
    of classifier-free guidance, "latent" does not differentiate the denoiser. tiny: the decoder in the gradient.
    """

    steps: int = 20
    guided: int = 4
    cfg_steps: int | None = None
    gradient: Literal["extra", "shared", "latent"] = "shared"
    tiny: bool = True

    def guidance(self, work: Work) -> float:
        """FLOPs that one guided step adds to an unguided one."""
        denoiser = {"extra": work.denoiser.both, "shared": work.denoiser.backward, "latent": 0.0}[self.gradient]
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


def limit(device: str, flops_per_sample: float, *, share: float = 1.0) -> float:
    """Samples/s at ``share`` of the peak of a device in ``PEAKS``. Raises ``ValueError`` for another device."""
    if device not in PEAKS:
        raise ValueError(f"device = {device!r}: expected one of {', '.join(PEAKS)}")
    return share * PEAKS[device][0] / flops_per_sample


def stable_diffusion_15(pixels: int) -> Work:
    """Stable Diffusion 1.5: UNet of 859.5 M parameters, 77 tokens of width 768; ViT-B/16 at 224 px as the learner."""
    side = pixels // 8
    with torch.device("meta"):
        unet = _frozen(diffusers.UNet2DConditionModel(sample_size=side, cross_attention_dim=768, attention_head_dim=8))
        tokens, t = torch.empty(1, 77, 768), torch.empty(1)
        denoiser = count(lambda x: unet(x, t, encoder_hidden_states=tokens).sample, torch.empty(1, 4, side, side))
    return _latent(f"Stable Diffusion 1.5, {pixels} px", denoiser, side)


def dit_xl_2(pixels: int = 256) -> Work:
    """DiT-XL/2 with learned sigma; decoders and learner as for Stable Diffusion 1.5, whose autoencoder it uses."""
    side = pixels // 8
    with torch.device("meta"):
        dit = _frozen(
            diffusers.DiTTransformer2DModel(
                num_attention_heads=16,
                attention_head_dim=72,
                in_channels=4,
                out_channels=8,
                num_layers=28,
                sample_size=side,
                patch_size=2,
                num_embeds_ada_norm=1000,
            )
        )
        t, label = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        denoiser = count(lambda x: dit(x, timestep=t, class_labels=label).sample, torch.empty(1, 4, side, side))
    return _latent(f"DiT-XL/2, {pixels} px", denoiser, side)


def _latent(name: str, denoiser: Pass, side: int) -> Work:
    import transformers

    with torch.device("meta"):
        vae = _frozen(
            diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=4,
            )
        )
        tiny = _frozen(diffusers.AutoencoderTiny())
        vit = _frozen(transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)))
        latents, images = torch.empty(1, 4, side, side), torch.empty(1, 3, 224, 224)
        return Work(
            name=name,
            denoiser=denoiser,
            decoder=count(lambda z: vae.decode(z).sample, latents),
            tiny=count(lambda z: tiny.decode(z).sample, latents),
            learner=count(lambda x: vit(x).logits, images),
        )


def _frozen(model: Any) -> Any:
    return model.eval().requires_grad_(False)
