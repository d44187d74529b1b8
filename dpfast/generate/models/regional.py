"""Regional compilation: all blocks of a deep transformer share one compiled block.

A whole step compiles every block again, so its compile time grows with the depth. Here the step
stays eager and calls one compiled block after the other; weights are inputs of the compiled code,
so all blocks of a kind share it. What lies outside of the blocks (embeddings, decoder, learner)
runs eagerly.

Guided steps differentiate through the blocks. torch.compile (2.13) refuses a compiled function
inside an eager ``torch.func.vjp``, so autograd records them (``BoundedPath.taped``): the compiled
forward keeps what its backward pass needs. Where memory does not allow that, a block keeps its
inputs alone and runs forward again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from dpfast.generate.models.blocks import blocks_of, replaced, with_children, with_forward
from dpfast.generate.models.checkpointing import checkpointed
from dpfast.generate.models.frozen_layers import Conditioned, Modulated

Names = tuple[str, ...]
Region = Literal["step", "blocks"]  # what is compiled


def has_region(denoiser: Any) -> bool:
    """Whether the denoiser's model has transformer blocks; a UNet's levels differ, each from the
    next.
    """
    return len(getattr(getattr(denoiser, "model", None), "transformer_blocks", ())) > 0


def regional(
    denoiser: Any,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    recompute: bool = False,
) -> Any:
    """A twin of a denoiser for which ``has_region`` holds, with the same weights and compiled
    blocks.

    compile: makes a compiled function of a plain one. recompute: the backward pass of a block runs
    its forward again.
    """
    run = compile(_forward)
    if recompute:
        run = partial(checkpointed, run)
    blocks: Any = blocks_of(denoiser)["transformer_blocks"]
    return replaced(
        denoiser,
        {"transformer_blocks": [_twin(block, index, run) for index, block in enumerate(blocks)]},
    )


def _forward(block: nn.Module, names: Names, *tensors: Tensor) -> tuple[Tensor, ...]:
    given: dict[str, Any] = dict(zip(names, tensors, strict=True))
    if "modulations" in given:
        given["timestep"] = Conditioned(given.pop("modulations"), given.pop("output"))
    out = block(**given)
    return tuple(value for value in out if value is not None) if isinstance(out, tuple) else (out,)


def _twin(block: nn.Module, index: int, run: Callable[..., tuple[Tensor, ...]]) -> nn.Module:
    # A DiT's block knows its place in the modulations. All blocks share the code, so each gets its
    # own row as row 0.
    norm = block.norm1
    first = {"norm1": Modulated(norm.norm, 0)} if isinstance(norm, Modulated) else {}
    alike = with_children(block, first)

    def call(*args: Tensor, **kwargs: Any) -> Any:
        given = dict(zip(("hidden_states",), args, strict=False)) | kwargs
        timestep = given.get("timestep")
        if isinstance(timestep, Conditioned):
            modulations = timestep.modulations[index : index + 1]
            given = {
                "hidden_states": given["hidden_states"],
                "modulations": modulations,
                "output": timestep.output,
            }
        given = {
            name: value.contiguous() for name, value in given.items() if isinstance(value, Tensor)
        }
        out = run(alike, tuple(given), *given.values())
        if "encoder_hidden_states" not in given:
            return out[0]
        return out if len(out) == 2 else (None, *out)  # the last joint block has no text behind it

    return with_forward(block, call)
