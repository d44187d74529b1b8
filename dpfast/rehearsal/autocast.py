"""bf16 autocast for tensors of the meta device, by the lists of CUDA's (torch.amp, "Autocast Op
Reference").

torch.autocast knows no meta device, so what it would save for a backward pass cannot be read off
there. This mode casts as it does: products in bf16, norms, softmax and losses in fp32, all other
operations in the type that their inputs promote to. With ``cache_enabled`` a weight has one bf16
copy for all of its uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from dpfast.hardware.flops import Fused

HALF = frozenset(
    {
        F.linear,
        F.bilinear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose2d,
        F.scaled_dot_product_attention,
        torch.conv2d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        Tensor.matmul,
        Tensor.mm,
        Tensor.bmm,
        Tensor.__matmul__,
    }
)
FULL = frozenset(
    {
        F.layer_norm,
        F.group_norm,
        F.softmax,
        F.log_softmax,
        F.cross_entropy,
        F.nll_loss,
        F.normalize,
        F.softplus,
        torch.softmax,
        torch.log_softmax,
        torch.layer_norm,
        torch.group_norm,
        torch.exp,
        torch.log,
        torch.pow,
        torch.rsqrt,
        torch.norm,
        torch.cumsum,
        torch.sum,
        torch.prod,
        Tensor.softmax,
        Tensor.exp,
        Tensor.log,
        Tensor.pow,
        Tensor.__pow__,
        Tensor.rsqrt,
        Tensor.norm,
        Tensor.cumsum,
        Tensor.sum,
        Tensor.prod,
    }
)


class MetaAutocast(TorchFunctionMode):
    """Stands for ``torch.autocast("cuda", torch.bfloat16)``, for floating tensors of the meta
    device.
    """

    active: ClassVar[int] = 0  # how many are entered

    def __init__(self, *, cache_enabled: bool = True) -> None:
        super().__init__()
        self.cache_enabled = cache_enabled
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> MetaAutocast:
        MetaAutocast.active += 1
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        MetaAutocast.active -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HALF:
            args, kwargs = tree_map_only(Tensor, self._half, (args, kwargs))
        elif func in FULL:
            args, kwargs = tree_map_only(Tensor, _full, (args, kwargs))
        return func(*args, **kwargs)

    def _half(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32 or not tensor.is_meta:
            return tensor
        if not (self.cache_enabled and tensor.requires_grad and tensor.is_leaf):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = tensor, tensor.to(torch.bfloat16)
        return self._weights[id(tensor)][1]


def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns ``torch.utils.checkpoint.checkpoint``, which runs ``function`` again as it ran: under
    autocast or not.

    A backward pass has left the modes that its call was made in.
    """
    cast = MetaAutocast.active > 0

    def run(*inputs: Any, **named: Any) -> Any:
        with Fused(), MetaAutocast(cache_enabled=False) if cast else contextlib.nullcontext():
            return function(*inputs, **named)

    return torch.utils.checkpoint.checkpoint(run, *args, **options)


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_meta and tensor.dtype == torch.bfloat16 else tensor
