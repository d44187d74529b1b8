"""The kernels that a model launches on a GPU and the bytes that they move, counted without one.

On the meta device a call computes nothing, and every operation of torch passes by with its shapes
and layouts. Each becomes the kernels that eager PyTorch 2.11 to 2.13 launches for it on CUDA:

- A product (convolution, matrix product, attention) reads its operands and writes its result.
- Everything else is pointwise work in memory: norms, activations, sums, biases, copies.
- A convolution adds its bias by a kernel of its own. In NCHW, cuDNN transposes what goes in and
  what comes out.
- GroupNorm knows no NHWC: it transposes its input and returns NCHW, which the next convolution
  transposes back.
- An operation of this package launches and moves what its formula says (``dpfast.ops.traffic``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dpfast.hardware.flops import Fused
from dpfast.ops.traffic import FORMULAS

Kind = Literal["product", "pointwise", "layout"]  # layout: a copy that only transposes

# change a tensor's description, and launch nothing
VIEWS = """
    view _unsafe_view reshape permute transpose t expand slice select unsqueeze squeeze split
    split_with_sizes chunk detach alias as_strided unbind narrow _reshape_alias lift_fresh empty
    empty_like empty_strided new_empty new_empty_strided scalar_tensor
"""
PRODUCTS = {packet.__name__ for packet in flop_registry} | {"_addmm_activation"}
SUMS = {"addmm", "baddbmm", "_addmm_activation"}  # products whose first operand is added
GATHERS = {"index_select", "embedding", "index", "gather"}


@dataclass(frozen=True)
class Kernel:
    """One launch. bytes: what it reads and writes; shape: of its result; own: of this package.

    Of a product, flops: a multiplication and its addition count as two; depth: how many of them a
    sum has, of an attention the size of a head.
    """

    name: str
    kind: Kind
    bytes: int
    shape: tuple[int, ...]
    flops: int = 0
    depth: int = 0
    own: bool = False


@dataclass(frozen=True)
class Traffic:
    """The launches of a call, in their order."""

    kernels: tuple[Kernel, ...]

    @property
    def launches(self) -> int:
        return len(self.kernels)

    @property
    def layout_copies(self) -> int:
        return sum(kernel.kind == "layout" for kernel in self.kernels)

    def bytes(self, *kinds: Kind) -> int:
        """Returns bytes of the kernels of these kinds, of all by default."""
        return sum(kernel.bytes for kernel in self.kernels if not kinds or kernel.kind in kinds)

    @property
    def pointwise(self) -> int:
        """The bytes of all that is no product."""
        return self.bytes("pointwise", "layout")


def count_traffic(call: Callable[[], object]) -> Traffic:
    """Returns the kernels of an eager ``call`` on the meta device, its backward pass included where
    it runs one.
    """
    with Fused(), _Recorder() as recorder:
        call()
    return Traffic(tuple(recorder.kernels))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def add(self, name: str, kind: Kind, moved: int, shape: Any, **more: Any) -> None:
        self.kernels.append(Kernel(name, kind, moved, tuple(shape), **more))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        name = packet.__name__
        if packet in FORMULAS:
            out = func(*args, **kwargs)
            first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
            kind, formula = FORMULAS[packet]
            work: dict[str, int] = {}
            if kind == "product":
                flops = flop_registry[packet](*args, **kwargs, out_val=out)
                work = {"flops": flops, "depth": flops // (2 * first.numel())}
            for moved in formula(*args, **kwargs, out=out):
                self.add(name, kind, moved, first.shape, own=True, **work)
            return out
        if func.namespace == "dpfast":
            raise NotImplementedError(f"{func} has no formula of its traffic")
        special: dict[str, Callable[..., Any]] = {
            "native_group_norm": self._group_norm,
            "native_group_norm_backward": self._group_norm_backward,
            "convolution": self._convolution,
            "convolution_backward": self._convolution_backward,
        }
        if name in special:
            return special[name](func, *args, **kwargs)
        out = func(*args, **kwargs)
        if name not in VIEWS.split():
            self._plain(func, args, kwargs, out)
        return out

    def _plain(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._overloadpacket.__name__
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        # a broadcast operand is read once, and of a table the rows that are taken
        moved = sum(min(_bytes(t), t.untyped_storage().nbytes()) for t in read)
        if name in GATHERS:
            moved = sum(_bytes(t) for t in (*read[1:], *written))
        moved += sum(_bytes(t) for t in written)
        shape = written[0].shape if written else ()
        if name in ("_to_copy", "clone", "copy_"):
            source, target = read[-1], written[0]
            alike = source.stride() == target.stride() or source.dtype != target.dtype
            transposes = source.dim() == 4 and not alike
            self.add(name, "layout" if transposes else "pointwise", moved, shape)
        elif "attention" in name:
            # a backward pass computes the scores again: five products in the place of two
            backward = "backward" in name
            query, key, *_ = args[1:] if backward else args
            flops = (10 if backward else 4) * query.numel() * key.shape[-2]
            self.add(name, "product", moved, shape, flops=flops, depth=query.shape[-1])
        elif name.removesuffix("_") in PRODUCTS:
            left = args[1] if name.removesuffix("_") in SUMS else args[0]
            depth = left.shape[-1]
            flops = 2 * math.prod(shape) * depth
            self.add(name, "product", moved, shape, flops=flops, depth=depth)
        else:
            self.add(name, "pointwise", moved, shape)

    def _group_norm(self, func: Any, x: Tensor, *rest: Any, **_: Any) -> tuple[Tensor, ...]:
        samples, groups = rest[2], rest[5]
        if not x.is_contiguous():
            self.add("group_norm, transpose", "layout", 2 * _bytes(x), x.shape)
        self.add("group_norm, sums", "pointwise", _bytes(x), x.shape)
        self.add("group_norm", "pointwise", 2 * _bytes(x), x.shape)
        sums = x.new_empty(samples, groups)
        return x.new_empty(x.shape), sums, torch.empty_like(sums)

    def _group_norm_backward(
        self, func: Any, grad: Tensor, x: Tensor, *rest: Any, **_: Any
    ) -> tuple[Tensor | None, ...]:
        for tensor in (grad, x):
            if not tensor.is_contiguous():
                self.add("group_norm backward, transpose", "layout", 2 * _bytes(x), x.shape)
        self.add("group_norm backward, sums", "pointwise", 2 * _bytes(x), x.shape)
        self.add("group_norm backward", "pointwise", 3 * _bytes(x), x.shape)
        return x.new_empty(x.shape), None, None

    def _convolution(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> Tensor:
        out = func(x, weight, bias, *rest)
        if _nhwc(x) or _nhwc(weight):
            out = out.new_empty(out.shape).to(memory_format=torch.channels_last)
            if not _nhwc(x) and x.shape[1] > 1:
                self.add("convolution, to NHWC", "layout", 2 * _bytes(x), x.shape)
        else:
            self.add("convolution, cuDNN to NHWC", "layout", 2 * _bytes(x), x.shape)
            self.add("convolution, cuDNN to NCHW", "layout", 2 * _bytes(out), out.shape)
        moved = _bytes(x) + _bytes(weight) + _bytes(out)
        depth = math.prod(weight.shape[1:])
        flops = 2 * out.numel() * depth
        self.add("convolution", "product", moved, out.shape, flops=flops, depth=depth)
        if bias is not None:
            self.add("convolution, bias", "pointwise", 2 * _bytes(out), out.shape)
        return out

    def _convolution_backward(
        self, func: Any, grad: Tensor, x: Tensor, weight: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the input; weights are frozen."""
        dx = x.new_empty(x.shape)
        if _nhwc(x) or _nhwc(weight):
            dx = dx.to(memory_format=torch.channels_last)
            if not _nhwc(grad):
                self.add("convolution backward, to NHWC", "layout", 2 * _bytes(grad), grad.shape)
        else:
            self.add("convolution backward, cuDNN to NHWC", "layout", 2 * _bytes(grad), grad.shape)
            self.add("convolution backward, cuDNN to NCHW", "layout", 2 * _bytes(dx), dx.shape)
        moved = _bytes(grad) + _bytes(weight) + _bytes(dx)
        flops = 2 * grad.numel() * math.prod(weight.shape[1:])
        depth = flops // (2 * dx.numel())
        self.add("convolution backward", "product", moved, dx.shape, flops=flops, depth=depth)
        return dx, None, None


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.itemsize


def _nhwc(tensor: Tensor) -> bool:
    """Returns True if a tensor lies in NHWC and not, as one of a single channel may, in both
    orders.
    """
    if tensor.dim() != 4 or tensor.shape[1] == 1:
        return False
    if tensor.shape[2] == tensor.shape[3] == 1:
        return tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1]
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
