"""The work of a computation, counted on any device: FLOPs and bytes moved.

FLOPs are those of torch's flop counter: a multiplication and its addition count as two; norms,
activations and softmax do not count. Bytes moved are the operands and results of the same
operations, each once, as if everything between them were fused into them and the scores of an
attention never left the chip: a lower bound of the memory traffic. On the meta device nothing is
computed, so a laptop counts Stable Diffusion in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
# products under names that torch's registry does not have -> those of the same arguments
SUMS = {
    ATEN.addmm_: ATEN.addmm,
    ATEN._addmm_activation: ATEN.addmm,
    ATEN.baddbmm_: ATEN.baddbmm,
}


@dataclass(frozen=True)
class Passes:
    """FLOPs of one sample: forward, and backward to the input alone (frozen weights)."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Counts:
    """The work of a computation.

    Attributes:
        half: FLOPs whose result is a 16-bit float.
        full: FLOPs whose result is a 32-bit float.
        moved: Bytes of all their operands and results.
        float8: FLOPs of 8-bit operands.
    """

    half: float = 0.0
    full: float = 0.0
    moved: float = 0.0
    float8: float = 0.0

    @property
    def flops(self) -> float:
        return self.half + self.full + self.float8

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Counts(*(mine + others for mine, others in pairs))

    def __mul__(self, times: float) -> Counts:
        return Counts(*(each * times for each in astuple(self)))


def _operands(args: Any, kwargs: Any) -> dict[str, Any]:
    """Returns the operands of an attention by name: diffusers' newer models say it by keywords."""
    return dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})


class _Attention(TorchFunctionMode):
    """Remembers what attentions compute: (queries, keys) of their scores -> bytes of an element
    that goes in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[tuple[int, ...], int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = _operands(args, kwargs)
            (*_, queries, _), (*_, keys, _) = given["query"].shape, given["key"].shape
            size = given["query"].itemsize
            self.scores |= dict.fromkeys([(queries, keys), (keys, queries)], size)
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    """``FlopCounterMode`` without its tracking of modules, which the backward pass of a vjp does
    not bear.
    """

    def __init__(self, attention: _Attention) -> None:
        super().__init__()
        self.attention = attention
        self.total = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(SUMS.get(func._overloadpacket, func._overloadpacket))
        if formula is not None:
            amount = float(formula(*args, **(kwargs or {}), out_val=out))
            tensors = [
                leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)
            ]
            scores = self.attention.scores
            inside = [scores[tuple(t.shape[-2:])] for t in tensors if tuple(t.shape[-2:]) in scores]
            # the plain form of an attention computes in fp32 what the fused ones compute in the
            # dtype that goes in
            size = inside[0] if inside else 8
            moved = sum(
                t.numel() * min(t.itemsize, size)
                for t in tensors
                if tuple(t.shape[-2:]) not in scores
            )
            operand, result = (min(t.itemsize, size) for t in (tensors[0], tensors[-1]))
            kind = "float8" if operand == 1 else "half" if result <= 2 else "full"
            self.total += Counts(moved=moved, **{kind: amount})
        return out


class Fused(TorchFunctionMode):
    """A mode in which attention on the meta device holds what a fused one does: no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _operands(args, kwargs) if func is F.scaled_dot_product_attention else {}
        if given and given["query"].is_meta:
            query, key, value = (given[name] for name in ("query", "key", "value"))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, attn_mask=given.get("attn_mask")
            )[0]
        return func(*args, **(kwargs or {}))


def count_work(call: Callable[[], object]) -> Counts:
    """Counts the work of an eager ``call``, with attention in its plain form, whose FLOPs are those
    of every form.
    """
    with _Attention() as attention, _Counter(attention) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.total


def count_flops(call: Callable[[], object]) -> float:
    """Returns FLOPs of the matrix products, convolutions and attentions in an eager ``call``."""
    return count_work(call).flops


def count_passes(function: Callable[[Tensor], Tensor], x: Tensor) -> Passes:
    """Returns the passes of ``function`` at a batch ``x`` (B, ...) of floating type, for one
    sample.
    """
    x = x.detach().requires_grad_(True)
    kept: list[Tensor] = []
    with torch.enable_grad():
        forward = count_flops(lambda: kept.append(function(x)))
        backward = count_flops(lambda: kept[0].backward(torch.ones_like(kept[0])))
    return Passes(forward / len(x), backward / len(x))
