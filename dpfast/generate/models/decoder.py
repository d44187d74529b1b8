"""Decoders: latents (B, c, h, w), scaled to unit variance, to float32 images (B, C, H, W) in [-1,
1].

A decoder runs in the dtype and on the device of its weights. None reads the host, so each traces
inside a compiled step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import diffusers
import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from dpfast.errors import InputError
from dpfast.generate.models.fused import fuse
from dpfast.generate.resizing import resize
from dpfast.hardware.flops import count_passes


class Decoder(Protocol):
    """A function from latents (B, c, h, w) of unit variance to float32 images (B, C, H, W) in [-1,
    1].
    """

    def __call__(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class Encoder(Protocol):
    """The way back of the full decoders: images in [-1, 1] to latents, a distribution's mode where
    it is one.
    """

    def encode(self, images: Tensor) -> Tensor: ...


def decoder_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that an autoencoder of this configuration runs in where the others run in
    ``dtype``.

    It is float32 where the configuration says ``force_upcast``, as that of Stable Diffusion XL
    does, whose activations exceed the largest float16. diffusers fills in True where a file says
    nothing, as that of Stable Diffusion 1.5 does, and then runs it in ``dtype`` all the same; so
    does this.
    """
    said = "force_upcast" not in config.get("_use_default_values", ())
    return torch.float32 if said and config.get("force_upcast") else dtype


class Unscale:
    """A map from latents of unit variance to those of an autoencoder: z std / scaling_factor + mean
    + shift_factor.

    The four values come from the autoencoder's configuration; what it does not name changes
    nothing. mean and std are per channel (``latents_mean``, ``latents_std``), as in Stable
    Diffusion XL; a shift is what Stable Diffusion 3 has.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        parameter = next(model.parameters())
        self.dtype = parameter.dtype
        self.layout = torch.preserve_format

        def per_channel(name: str, default: float) -> Tensor:
            row = torch.tensor(
                _numbers(config, name, default), dtype=torch.float32, device=parameter.device
            )
            return row.view(1, -1, 1, 1)

        (factor,), (shift,) = (
            _numbers(config, name, default)
            for name, default in (("scaling_factor", 1.0), ("shift_factor", 0.0))
        )
        self.scale = per_channel("latents_std", 1.0) / factor
        self.shift = per_channel("latents_mean", 0.0) + shift

    def __call__(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.scale.device) * self.scale + self.shift
        return latents.to(self.dtype, memory_format=self.layout)

    def inverse(self, latents: Tensor) -> Tensor:
        """Returns the way back, in float32."""
        return (latents.float() - self.shift) / self.scale


DIVISORS = ("scaling_factor", "latents_std")  # on the way to latents


def _numbers(config: Any, name: str, default: float) -> list[float]:
    """Returns a number of an autoencoder's configuration, or one for each channel where it has a
    list; ``default`` where it is null or not there.
    """
    value = config.get(name)
    if value is None:
        return [default]
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    for number in given:
        real = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not (real and math.isfinite(number)) or (number == 0 and name in DIVISORS):
            other = " other than 0" if name in DIVISORS else ""
            raise InputError(f"vae: {name} = {value!r}: expected finite numbers{other}")
    per_channel = name.startswith("latents_")
    channels = (config.get("latent_channels") or len(given)) if per_channel else 1
    if len(given) not in (1, channels):
        expected = f"one number or {channels}, one a channel" if per_channel else "one number"
        raise InputError(f"vae: {name} = {value!r}: expected {expected}")
    return [float(number) for number in given]


def _repeat(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = arguments
    b, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        x = (
            x.permute(0, 2, 3, 1)[:, :, None, :, None]
            .expand(b, h, 2, w, 2, c)
            .reshape(b, 2 * h, 2 * w, c)
        )
        return (x.permute(0, 3, 1, 2), *rest)
    return (x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w), *rest)


def _upsample_by_repeating(model: nn.Module) -> nn.Module:
    """Upsamples to the nearest neighbour by a broadcast: the same values, and a sum instead of a
    scatter as its backward.

    With the scatter, torch.compile (2.13, CPU) gives a gradient of zero through a whole
    ``AutoencoderKL``.
    """
    for module in model.modules():
        if isinstance(module, Upsample2D) and module.interpolate and not module.use_conv_transpose:
            module.interpolate = False
            module.register_forward_pre_hook(_repeat)
    return model


class AutoencoderDecoder:
    """An autoencoder of diffusers as it is, for instance that of a live pipeline; a copy of it
    in float32 where its configuration asks for that (``decoder_dtype``).
    """

    def __init__(self, model: Any) -> None:  # nn.Module is typed without decode and encode
        given = next(model.parameters()).dtype
        if given != decoder_dtype(model.config, given):
            model = copy.deepcopy(model).float()
        self.model = model
        self._unscale = Unscale(model)
        self.dtype = self._unscale.dtype

    def __call__(self, latents: Tensor) -> Tensor:
        return self.model.decode(self._unscale(latents)).sample.float()


class VaeDecoder(AutoencoderDecoder):
    """The pipeline's full ``AutoencoderKL``: the decoder of the images that enter the pool.

    fused: whether its blocks are replaced by their fused forms (``dpfast.generate.models.fused``).
    """

    def __init__(self, model: Any, *, fused: bool = False) -> None:
        model = model.eval().requires_grad_(False)
        if fused:
            fuse(model.decoder)
        super().__init__(_upsample_by_repeating(model))
        if fused:
            self._unscale.layout = torch.channels_last

    def encode(self, images: Tensor) -> Tensor:
        latents = self.model.encode(images.to(self._unscale.dtype)).latent_dist.mode()
        return self._unscale.inverse(latents)


class DeepCompressionDecoder(VaeDecoder):
    """The full ``AutoencoderDC`` of SANA (Chen et al. 2024, arXiv 2410.10733): 32 times fewer
    elements in height and width. ``fused`` as for ``VaeDecoder``; it has no fused blocks.
    """

    def encode(self, images: Tensor) -> Tensor:
        return self._unscale.inverse(self.model.encode(images.to(self._unscale.dtype)).latent)


class TinyDecoder(AutoencoderDecoder):
    """A distilled ``AutoencoderTiny``: the decoder of the guidance path, where the full one
    dominates the cost. ``fused`` as for ``VaeDecoder``.
    """

    def __init__(self, model: Any, *, fused: bool = False) -> None:
        # Channels last: a third faster with its gradient on a CPU, and what convolutions on a GPU
        # want.
        model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        if fused:
            fuse(model.decoder)
        super().__init__(model)
        if fused:
            self._unscale.layout = torch.channels_last

    def encode(self, images: Tensor) -> Tensor:
        return self._unscale.inverse(self.model.encode(images.to(self._unscale.dtype)).latents)


def times_a_tiny_one(decoder: AutoencoderDecoder, shape: tuple[int, ...]) -> float:
    """Returns FLOPs of a forward and a backward pass through a decoder of latents ``shape`` (c, h,
    w), over those through a tiny one for the same latents: TAESD, with as many levels. Derived:
    both are counted on the meta device.
    """
    config = decoder.model.config
    levels = len(config.get("decoder_block_out_channels") or config.block_out_channels)
    with torch.device("meta"):
        full = type(decoder.model).from_config(config)
        tiny = diffusers.AutoencoderTiny(
            out_channels=config.get("out_channels") or config.in_channels,
            latent_channels=config.latent_channels,
            encoder_block_out_channels=(64,) * levels,
            decoder_block_out_channels=(64,) * levels,
            num_encoder_blocks=(3,) * levels,
            num_decoder_blocks=(3,) * (levels - 1) + (1,),
        )
        x = torch.empty(1, *shape)
        passes = [count_passes(lambda x, m=m: m.decode(x).sample, x).both for m in (full, tiny)]  # type: ignore[misc]
    return passes[0] / passes[1]


class ResizedDecoder:
    """Another decoder, its images resized to a square of ``size`` pixels (bilinear,
    antialiased).
    """

    def __init__(self, decoder: Decoder, size: int) -> None:
        self.decoder, self.size = decoder, size
        self.dtype = getattr(decoder, "dtype", torch.float32)

    def __call__(self, latents: Tensor) -> Tensor:
        images = self.decoder(latents)
        if images.shape[-2:] == (self.size, self.size):
            return images
        return resize(images, (self.size, self.size))


class IdentityDecoder:
    """The decoder of a model in pixel space: its latents are the images."""

    def __call__(self, latents: Tensor) -> Tensor:
        return latents.float()

    def encode(self, images: Tensor) -> Tensor:
        return images.float()
