"""Regional compilation: all blocks of a deep transformer share two compilations, of their forward and backward passes.

A whole step compiles every block again, so its compile time grows with the depth. Here the step stays eager and calls
one compiled block after the other; weights are inputs of the compiled code, so all blocks of a kind share it. What lies
outside of the blocks (embeddings, decoder, learner) runs eagerly.

Guided steps differentiate through the blocks, and torch.compile (2.13) refuses a compiled function inside an eager
``torch.func.vjp``. So a block is an autograd function: its backward is a compiled vjp of the block, which runs the
forward again and keeps only the block's inputs, as ``dpfast.generate.recompute`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.generate.conditioning import Conditioned
from dpfast.generate.recompute import with_blocks

Names = tuple[str, ...]


def has_region(denoiser: Any) -> bool:
    """Whether the denoiser's model has transformer blocks; a UNet's levels differ, each from the next."""
    return len(getattr(getattr(denoiser, "model", None), "transformer_blocks", ())) > 0


def regional(denoiser: Any, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """A twin of a denoiser for which ``has_region`` holds, with the same weights and compiled blocks.

    compile: makes a compiled function of a plain one.
    """
    forward, backward = compile(_forward), compile(_backward)
    blocks = list(denoiser.model.transformer_blocks)
    twins: list[nn.Module] = [_twin(block, index, forward, backward) for index, block in enumerate(blocks)]
    return with_blocks(denoiser, {"transformer_blocks": twins})


def _forward(block: nn.Module, names: Names, *tensors: Tensor) -> tuple[Tensor, ...]:
    given: dict[str, Any] = dict(zip(names, tensors, strict=True))
    if "modulations" in given:
        given["timestep"] = Conditioned(given.pop("modulations"), given.pop("output"))
    out = block(**given)
    return tuple(value for value in out if value is not None) if isinstance(out, tuple) else (out,)


def _backward(
    block: nn.Module, names: Names, at: tuple[int, ...], tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients at the tensors of places ``at``."""

    def again(*chosen: Tensor) -> tuple[Tensor, ...]:
        given = list(tensors)
        for place, value in zip(at, chosen, strict=True):
            given[place] = value
        return _forward(block, names, *given)

    _, back = torch.func.vjp(again, *(tensors[place] for place in at))  # type: ignore[misc]
    return back(grads)


class _Compiled(torch.autograd.Function):
    """A block by its compiled passes. Differentiable once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(forward: Any, backward: Any, block: nn.Module, names: Names, *tensors: Tensor) -> tuple[Tensor, ...]:
        return forward(block, names, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.backward_pass, ctx.block, ctx.names, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # the vjp has ended: its wrappers around the tensors are empty, and torch.compile does not look through them
        unwrap = torch._C._functorch.unwrap_if_dead
        tensors, given = (tuple(map(unwrap, group)) for group in (ctx.saved_tensors, grads))
        at = tuple(i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed)
        found: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(at, ctx.backward_pass(ctx.block, ctx.names, at, tensors, given), strict=True):
            found[i] = gradient
        return (None, None, None, None, *found)


def _twin(block: nn.Module, index: int, forward: Any, backward: Any) -> nn.Module:
    # A DiT's block knows its place in the modulations. All blocks share the code, so each gets its own row as row 0.
    alike = copy.copy(block)
    alike._modules = dict(block._modules)
    if hasattr(block.norm1, "block"):
        first: Any = copy.copy(block.norm1)
        first.block = 0
        alike.norm1 = first

    def call(*args: Tensor, **kwargs: Any) -> Any:
        given = dict(zip(("hidden_states",), args, strict=False)) | kwargs
        timestep = given.get("timestep")
        if isinstance(timestep, Conditioned):
            modulations = timestep.modulations[index : index + 1]
            given = {"hidden_states": given["hidden_states"], "modulations": modulations, "output": timestep.output}
        given = {name: value.contiguous() for name, value in given.items() if isinstance(value, Tensor)}
        out = _Compiled.apply(forward, backward, alike, tuple(given), *given.values())
        if "encoder_hidden_states" not in given:
            return out[0]
        return out if len(out) == 2 else (None, *out)  # the last joint block has no text behind it

    twin = copy.copy(block)
    twin.__dict__["forward"] = call
    return twin
