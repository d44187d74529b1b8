"""The projections of attention in as few products as there are inputs."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn


@torch.no_grad()
def fuse_projections(model: nn.Module) -> nn.Module:
    """Query, key and value of self-attention as one product, key and value of cross-attention as
    one; in place.

    For diffusers' ``Attention`` with its default processor. Others stay as they are: xformers'
    reads the parts, and the fused form of joint attention (Stable Diffusion 3) lacks the norms of
    query and key.
    """
    for module in model.modules():
        if not isinstance(module, Attention) or type(module.processor) is not AttnProcessor2_0:
            continue
        module.fuse_projections()
        module.set_processor(FusedAttnProcessor2_0())
        for name in ("to_k", "to_v") if module.is_cross_attention else ("to_q", "to_k", "to_v"):
            delattr(module, name)
    return model
