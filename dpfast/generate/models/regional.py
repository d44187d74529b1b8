"""Regional compilation: blocks that repeat are compiled once for all of their kind.

A whole step compiles every block again, so its compile time grows with the depth. Here the step
stays eager and calls one compiled block after the other; weights are inputs of the compiled code,
so all blocks of a kind share it: those of one class with weights of the same shapes. Denoiser,
decoders and learner alike; what lies between the blocks (embeddings, samplers, heads) runs eagerly,
and so do fused blocks (``dpfast.generate.models.fused``), whose passes torch.compile cannot lessen
(docs/records/numerics.md).

Guided steps differentiate through the blocks. torch.compile (2.13) refuses a compiled function
inside an eager ``torch.func.vjp``, so autograd records them (``BoundedPath.taped``): the compiled
forward keeps what its backward pass needs. Where memory does not allow that, a block keeps its
inputs alone and runs forward again.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dpfast.generate.models.blocks import with_children, with_forward
from dpfast.generate.models.checkpointing import checkpointed
from dpfast.generate.models.frozen_layers import Conditioned, Modulated

Region = Literal["step", "blocks"]  # what is compiled
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

# Model -> the blocks in it that are compiled, by the names of their classes. A model of another
# class says it itself: diffusers' ``_repeated_blocks``, and transformers' ``_no_split_modules``,
# the layers that never lie on two devices.
REPEATED = {
    "AutoencoderKL": ("ResnetBlock2D",),
    "AutoencoderDC": ("ResBlock", "EfficientViTBlock"),
    "AutoencoderTiny": ("AutoencoderTinyBlock",),
    "DiTTransformer2DModel": ("BasicTransformerBlock",),
    "SD3Transformer2DModel": ("JointTransformerBlock",),
    "VisionTransformer": ("EncoderBlock", "Block"),  # torchvision's and timm's
}


def has_region(denoiser: Any) -> bool:
    """Returns True if the denoiser's model says which of its blocks repeat."""
    model = getattr(denoiser, "model", None)
    return isinstance(model, nn.Module) and bool(_names(model))


class Regions:
    """Twins of models with the same weights and compiled blocks. Blocks of a kind share their code,
    across models too.

    compile: makes a compiled function of a plain one. ``functions``: those that ran, by the kind
    of the block and the shapes of what it was given.
    """

    def __init__(self, compile: Compile) -> None:
        self.compile = compile
        self.functions: dict[Any, Callable[..., Any]] = {}

    def twin(self, part: Any, *, recompute: bool = False) -> Any:
        """Returns the twin of a module, or of a denoiser or decoder around one; what has no such
        blocks as it is.

        recompute: the backward pass of a block runs its forward again.
        """
        if isinstance(part, nn.Module):
            return self._module(part, (), recompute)
        for name in ("model", "decoder"):
            inner = getattr(part, name, None)
            if inner is not None:
                twin = copy.copy(part)
                setattr(twin, name, self.twin(inner, recompute=recompute))
                return twin
        return part

    def _module(self, module: nn.Module, names: tuple[str, ...], recompute: bool) -> nn.Module:
        names = _names(module) or names
        if type(module).__name__ in names:
            return self._block(module, recompute)
        if "forward" in vars(module):  # of somebody else, around the modules that it knows
            return module
        children = {
            name: self._module(child, names, recompute)
            for name, child in module._modules.items()
            if child is not None
        }
        if all(child is module._modules[name] for name, child in children.items()):
            return module
        return with_children(module, children)

    def _block(self, block: nn.Module, recompute: bool) -> nn.Module:
        alike, norm = block, getattr(block, "norm1", None)
        index = norm.block if isinstance(norm, Modulated) else None
        if isinstance(norm, Modulated):
            # A DiT's block knows its place in the modulations. All blocks share the code, so each
            # gets its own row as row 0.
            alike = with_children(alike, {"norm1": Modulated(norm.norm, 0)})
        kind = (type(block), *((n, w.shape, w.dtype) for n, w in block.state_dict().items()))

        def call(*args: Any, **kwargs: Any) -> Any:
            if index is not None:
                kwargs["timestep"] = _row(kwargs["timestep"], index)
            given = tree_map_only(Tensor, _dense, (args, kwargs))
            run = self._function(kind, given)
            # a learner's weights are constants here, and may be others in the next call
            held = {n: w.detach() for n, w in block.named_parameters() if w.requires_grad}
            if recompute:
                return checkpointed(run, alike, held, *given)
            return run(alike, held, *given)

        return with_forward(block, call)

    def _function(self, kind: Any, given: Any) -> Callable[..., Any]:
        # torch.compile limits the compilations of one function
        key = (kind, *map(_described, tree_leaves(given)))
        if key not in self.functions:
            self.functions[key] = self.compile(_forward)
        return self.functions[key]


def _names(model: Any) -> tuple[str, ...]:
    """Returns the classes of the blocks that repeat in a model; none where it does not say."""
    for parent in type(model).__mro__:
        if parent.__name__ in REPEATED:
            return REPEATED[parent.__name__]
    if getattr(model, "_repeated_blocks", None):
        return tuple(model._repeated_blocks)
    stated = getattr(model, "_no_split_modules", None) or ()
    counts = Counter(type(module).__name__ for module in model.modules()) if stated else Counter()
    return tuple(name for name in stated if counts[name] > 1)


def _forward(
    block: nn.Module, held: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if held:
        return torch.func.functional_call(block, held, args, kwargs)
    return block(*args, **kwargs)


def _row(timestep: Any, index: int) -> Any:
    return Conditioned(timestep.modulations[index : index + 1], timestep.output)


def _dense(tensor: Tensor) -> Tensor:
    """Returns the tensor without gaps, so that the blocks of a kind are given the same strides."""
    nhwc = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if nhwc else tensor.contiguous()


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return repr(leaf)
