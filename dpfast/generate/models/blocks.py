"""Twins of diffusers' modules: other blocks or another forward around the same weights.

Feature caching, activation checkpointing and regional compilation all run a frozen denoiser in
another way than it was built for. None of them changes the model, which a pipeline shares: each
makes shallow copies, whose parameters are those of the original.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dpfast.generate.models.fused import alone

# The attributes under which diffusers' transformers and UNets keep their blocks.
TRANSFORMERS = ("transformer_blocks", "single_transformer_blocks")  # as they run
NAMES = (*TRANSFORMERS, "down_blocks", "mid_block", "up_blocks")
Blocks = dict[str, list[nn.Module] | nn.Module]  # by attribute


def blocks_of(denoiser: Any) -> Blocks:
    """Returns the blocks of a denoiser's model by attribute; empty for a model of an unknown build.

    Each stands alone: what lies between them are hidden states.
    """
    found: Blocks = {}
    for name in NAMES:
        part = getattr(getattr(denoiser, "model", None), name, None)
        if isinstance(part, nn.Module):
            found[name] = [*map(alone, part)] if isinstance(part, nn.ModuleList) else part
    return found


def replaced(denoiser: Any, blocks: Blocks) -> Any:
    """Returns a twin of a denoiser with other blocks in its model, and the same weights
    elsewhere.
    """
    twin = copy.copy(denoiser)
    parts = {k: nn.ModuleList(v) if isinstance(v, list) else v for k, v in blocks.items()}
    twin.model = with_children(denoiser.model, parts)
    return twin


def with_children(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """Returns a twin of ``module`` with the same weights and attributes, and other children by
    name.
    """
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """Returns a twin of ``module`` with the same weights and attributes, and another forward."""
    twin = copy.copy(module)
    twin.__dict__["forward"] = forward
    return twin
