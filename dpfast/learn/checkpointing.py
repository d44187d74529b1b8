"""Activation checkpointing: a block keeps its input alone, and its backward pass computes the rest
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dpfast.errors import InputError


def checkpoint_activations(model: nn.Module) -> None:
    """Lets every repeated block of ``model`` keep its input alone for the backward pass, where the
    model learns.

    The gradients are the same: the random state of dropout is restored, and batch norms count a
    batch once. A step costs almost one more forward pass of the blocks.

    Raises ``InputError`` where no module is repeated.
    """
    blocks = repeated_blocks(model)
    if len(blocks) < 2:
        raise InputError(
            f"activation_checkpointing = True: {type(model).__name__} repeats "
            "no module in a list of modules of one class, so there is no "
            "block to compute again; expected False, and a smaller micro_batch"
        )
    for block in blocks:
        block.forward = partial(_checkpointed, block, block.forward)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks that a network is a stack of: the members of its innermost ``ModuleList``s
    and ``Sequential``s whose members are of one class and made of further modules.
    """
    found = [block for child in model.children() for block in repeated_blocks(child)]
    members = list(model.children()) if isinstance(model, (nn.ModuleList, nn.Sequential)) else []
    alike = len({type(member) for member in members}) == 1 and all(
        any(True for _ in m.children()) for m in members
    )
    return found or (members if alike else [])


def _checkpointed(block: nn.Module, forward: Any, *arguments: Any, **named: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*arguments, **named)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)


def _contexts(
    block: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _counted(block)


@contextlib.contextmanager
def _counted(block: nn.Module) -> Iterator[None]:
    """Lets batch norms leave their running statistics within a ``with`` block: those have seen the
    batch already.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked for norm in norms]
    before = [None if count is None else count.clone() for count in counts]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for count, old in zip(counts, before, strict=True):
            if count is not None and old is not None:
                count.copy_(old)
