"""Activation checkpointing of a frozen denoiser.

A block keeps its inputs alone and runs again in the backward pass: a gradient holds one block's
activations instead of all blocks', for one more forward of the blocks. ``torch.utils.checkpoint``
hooks the tensors that autograd saves, which PyTorch's function transforms do not allow: a path
through such a denoiser is ``BoundedPath.taped``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dpfast.errors import InputError
from dpfast.generate.models.blocks import NAMES, Blocks, blocks_of, replaced, with_forward

checkpointed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def can_checkpoint(denoiser: Any) -> bool:
    """Returns True if the denoiser has a model with blocks that are known here."""
    return bool(blocks_of(denoiser))


def with_checkpointing(denoiser: Any) -> Any:
    """Returns a twin of a denoiser of ``dpfast.generate.models.denoiser``, with the same weights,
    that recomputes its blocks in the backward pass.

    Raises ``InputError`` for a model without blocks that are known here.
    """
    if not can_checkpoint(denoiser):
        raise InputError(
            f"denoiser is a {type(denoiser).__name__} "
            f"without any of {', '.join(NAMES)} to recompute"
        )
    blocks: Blocks = {
        name: [_recomputed(block) for block in part]
        if isinstance(part, list)
        else _recomputed(part)
        for name, part in blocks_of(denoiser).items()
    }
    return replaced(denoiser, blocks)


def _recomputed(block: nn.Module) -> nn.Module:
    return with_forward(block, partial(checkpointed, block.forward))
