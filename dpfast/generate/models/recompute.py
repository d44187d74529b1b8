"""Activation checkpointing of a frozen denoiser.

A block keeps its inputs alone and runs again in the backward pass: a gradient holds one block's
activations instead of all blocks', for one more forward of the blocks. ``torch.utils.checkpoint``
hooks the tensors that autograd saves, which PyTorch's function transforms do not allow: a path
through such a denoiser is ``GuidancePath.taped``.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dpfast.errors import InputError

Blocks = dict[str, list[nn.Module] | nn.Module]  # by attribute
# The attributes under which diffusers' transformers and UNets keep their blocks.
BLOCKS = ("transformer_blocks", "down_blocks", "mid_block", "up_blocks")
checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def _recomputing(block: nn.Module) -> nn.Module:
    """A twin of ``block`` with the same weights whose call is recomputed in the backward pass."""
    twin = copy.copy(block)
    twin.__dict__["forward"] = partial(checkpointed, block.forward)
    return twin


def can_recompute(denoiser: Any) -> bool:
    """Whether the denoiser has a model with blocks that are known here."""
    return bool(_blocks(denoiser))


def _blocks(denoiser: Any) -> list[str]:
    model = getattr(denoiser, "model", None)
    return [name for name in BLOCKS if isinstance(getattr(model, name, None), nn.Module)]


def recomputing(denoiser: Any) -> Any:
    """A twin of a denoiser of ``dpfast.generate.models.denoiser``, with the same weights, that
    recomputes its blocks.

    Raises ``InputError`` for a model without blocks that are known here.
    """
    if not can_recompute(denoiser):
        raise InputError(
            f"denoiser is a {type(denoiser).__name__} without any of {', '.join(BLOCKS)} to "
            "recompute"
        )
    recomputed: Blocks = {}
    for name in _blocks(denoiser):
        blocks = getattr(denoiser.model, name)
        recomputed[name] = (
            [_recomputing(b) for b in blocks]
            if isinstance(blocks, nn.ModuleList)
            else _recomputing(blocks)
        )
    return with_blocks(denoiser, recomputed)


def with_blocks(denoiser: Any, blocks: Blocks) -> Any:
    """A twin of a denoiser with other blocks in its model, and the same weights elsewhere."""
    twin = copy.copy(denoiser)
    twin.model = copy.copy(denoiser.model)
    twin.model._modules = dict(denoiser.model._modules)
    for name, part in blocks.items():
        twin.model._modules[name] = nn.ModuleList(part) if isinstance(part, list) else part
    return twin
