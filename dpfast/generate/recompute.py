"""Activation checkpointing of a frozen denoiser that works inside ``torch.func.vjp``.

A block keeps its inputs alone and runs again in the backward pass: a gradient holds one block's activations instead of
all blocks', for one more forward of the blocks. (``torch.utils.checkpoint`` hooks saved tensors, which PyTorch's
function transforms do not allow.) For eager steps: torch.compile (2.13) does not trace it inside a vjp. Blocks that are
compiled one by one recompute by themselves (``dpfast.generate.runtime.regional``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Blocks = dict[str, list[nn.Module] | nn.Module]  # by attribute
# The attributes under which diffusers' transformers and UNets keep their blocks.
BLOCKS = ("transformer_blocks", "down_blocks", "mid_block", "up_blocks")


class _Recomputed(torch.autograd.Function):
    """``run(*tensors)`` to a tuple of tensors; its backward runs it again. Differentiable once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = list(ctx.saved_tensors)
        at = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]

        def again(*chosen: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for i, value in zip(at, chosen, strict=True):
                given[i] = value
            return ctx.run(*given)

        _, back = torch.func.vjp(again, *(tensors[i] for i in at))  # type: ignore[misc]
        found: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(at, back(tuple(grads)), strict=True):
            found[i] = gradient
        return (None, *found)


def _recomputing(block: nn.Module) -> nn.Module:
    """A twin of ``block`` with the same weights whose call is recomputed in the backward pass."""
    twin, forward = copy.copy(block), block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        returned: list[Any] = []  # the form of the output, with a place for each tensor

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = list(leaves)
            for i, value in zip(at, tensors, strict=True):
                given[i] = value
            inner_args, inner_kwargs = tree_unflatten(given, form)
            out, shape = tree_flatten(forward(*inner_args, **inner_kwargs))
            returned[:] = [shape, [isinstance(value, Tensor) for value in out]]
            return tuple(value for value in out if isinstance(value, Tensor))

        made = iter(_Recomputed.apply(run, *(leaves[i] for i in at)))
        return tree_unflatten([next(made) if tensor else None for tensor in returned[1]], returned[0])

    twin.__dict__["forward"] = call
    return twin


def can_recompute(denoiser: Any) -> bool:
    """Whether the denoiser has a model with blocks that are known here."""
    return bool(_blocks(denoiser))


def _blocks(denoiser: Any) -> list[str]:
    model = getattr(denoiser, "model", None)
    return [name for name in BLOCKS if isinstance(getattr(model, name, None), nn.Module)]


def recomputing(denoiser: Any) -> Any:
    """A twin of a denoiser of ``dpfast.generate.denoiser``, with the same weights, that recomputes its blocks.

    Raises ``ValueError`` for a model without blocks that are known here.
    """
    if not can_recompute(denoiser):
        raise ValueError(f"denoiser is a {type(denoiser).__name__} without any of {', '.join(BLOCKS)} to recompute")
    recomputed: Blocks = {}
    for name in _blocks(denoiser):
        blocks = getattr(denoiser.model, name)
        recomputed[name] = (
            [_recomputing(b) for b in blocks] if isinstance(blocks, nn.ModuleList) else _recomputing(blocks)
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
