"""diffusers' blocks in fewer passes through memory, with the same predictions up to rounding.

``fuse`` replaces, in a frozen model, each block of ``FORMS`` by its fused form: an operation of
``dpfast.ops`` takes norm, activation, bias, gate and residual along, and in NHWC nothing is
transposed. A block with an option that its form does not know stays as it is, and the log says
why. The plain modules are the reference that the tests compare with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    AutoencoderTinyBlock,
    CrossAttnUpBlock2D,
    UpBlock2D,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

from dpfast.generate.models.fused.adaptive import (
    FusedDiTBlock,
    FusedJointBlock,
    FusedPatches,
    alone,
    link,
    quantise,
)
from dpfast.generate.models.fused.conditions import share_conditions
from dpfast.generate.models.fused.convolutional import (
    FusedNorm,
    FusedResnet,
    FusedUpBlock,
    FusedUpsample,
)
from dpfast.generate.models.fused.refusal import Refusal, expect_no_hooks
from dpfast.generate.models.fused.tiny import tiny_block, tiny_decoder
from dpfast.generate.models.fused.transformer import FusedImageAttention, FusedTransformer

__all__ = ["FORMS", "alone", "fuse", "quantise", "share_conditions"]

log = logging.getLogger(__name__)

# diffusers' block -> its fused form, made of it. Exact classes: a subclass may compute otherwise.
FORMS: dict[type, Callable[[Any], nn.Module]] = {
    ResnetBlock2D: FusedResnet,
    Upsample2D: FusedUpsample,
    UpBlock2D: FusedUpBlock,
    CrossAttnUpBlock2D: FusedUpBlock,
    Transformer2DModel: FusedTransformer,
    Attention: FusedImageAttention,
    BasicTransformerBlock: FusedDiTBlock,
    JointTransformerBlock: FusedJointBlock,
    AutoencoderTinyBlock: tiny_block,
    DecoderTiny: tiny_decoder,
}
WHOLE = (FusedTransformer, FusedImageAttention, FusedDiTBlock, FusedJointBlock)


def fuse(module: nn.Module) -> nn.Module:
    """Replaces the blocks of a frozen model by their fused forms, in place, and returns the model
    (of a single block its form).

    module: of diffusers, in evaluation mode, with weights that never change again; a UNet or a
    decoder in channels_last memory. Logs once for each kind of block and reason what stays as it
    is.
    """
    refused: dict[str, int] = {}
    fused = _fused(module, refused)
    for reason, count in refused.items():
        log.info("not fused: %d %s", count, reason)
    return fused


def _fused(module: nn.Module, refused: dict[str, int]) -> nn.Module:
    form = FORMS.get(type(module))
    if form not in WHOLE:
        for name, child in list(module.named_children()):
            setattr(module, name, _fused(child, refused))
    try:
        _fuse_ends(module)
        if form is None:
            return module
        expect_no_hooks(module)
        return form(module)
    except Refusal as reason:
        name = f"{type(module).__name__}: {reason}"
        refused[name] = refused.get(name, 0) + 1
        return module


def _fuse_ends(module: Any) -> None:
    """Fuses what lies before, between and behind the blocks, where it is known: the biases of the
    convolutions that enlarge, the norm and activation before the last convolution of a UNet or
    decoder, the patches and the last norm of a transformer.
    """
    levels = list(getattr(module, "up_blocks", ()))
    for level, following in pairwise(levels):
        larger = getattr(level, "upsamplers", None) or [None]
        resnets = getattr(following, "resnets", None) or [None]
        if isinstance(larger[0], FusedUpsample) and isinstance(resnets[0], FusedResnet):
            bias = larger[0].leave_out_bias()
            if bias is not None:
                resnets[0].lacks(bias)
    norm, activation = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
    if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU:
        module.conv_norm_out = FusedNorm(norm, silu=True)
        module.conv_act = nn.Identity()
    if type(module) is PatchEmbed:
        module.proj = FusedPatches(module.proj)
        if module.pos_embed is not None:  # else the sum would be fp32
            module.pos_embed = module.pos_embed.to(module.proj.weight.dtype)
    if type(module) in (DiTTransformer2DModel, SD3Transformer2DModel):
        link(module)
