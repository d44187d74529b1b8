"""Decoders: latents (B, c, h, w), scaled to unit variance, to images (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Decoder(Protocol):
    def __call__(self, latents: Tensor) -> Tensor: ...


class VaeDecoder:
    """The pipeline's full ``AutoencoderKL``: the decoder of the images that enter the pool."""

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self._scale = float(vae.config.scaling_factor)  # type: ignore[union-attr, arg-type]

    def __call__(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self._scale).sample  # type: ignore[operator]


class TinyDecoder:
    """A distilled ``AutoencoderTiny``: the decoder of the guidance path, where the full one dominates the cost."""

    def __init__(self, tiny: nn.Module) -> None:
        self.tiny = tiny.eval().requires_grad_(False)

    def __call__(self, latents: Tensor) -> Tensor:
        return self.tiny.decode(latents).sample  # type: ignore[operator]


class IdentityDecoder:
    """For models in pixel space."""

    def __call__(self, latents: Tensor) -> Tensor:
        return latents
