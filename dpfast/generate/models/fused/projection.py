"""Frozen weights, and the linear layers made of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpfast import ops
from dpfast.generate.models.fused.refusal import expect, need


def frozen(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Keeps a prepared weight with the module: one that never changes."""
    kept = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
    module.register_parameter(name, kept)


def is_taped(x: Tensor) -> bool:
    """Returns True if a backward pass will ask for what is computed from ``x``, so that it must
    stay.
    """
    return torch.is_grad_enabled() and x.requires_grad


class _Parts(torch.autograd.Function):
    """A product whose columns are handed out in parts. The gradient of x is the sum of the parts'
    products (beta = 1); autograd would join their gradients first, by a copy.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> tuple[Tensor, ...]:
        return F.linear(x, weight, bias).chunk(count, dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        first, *others = (grad.flatten(0, -2) for grad in grads)
        weight, *weights = ctx.saved_tensors[0].chunk(len(grads))
        dx = first @ weight
        for grad, weight in zip(others, weights, strict=True):
            dx.addmm_(grad, weight)
        return dx.unflatten(0, grads[0].shape[:-1]), None, None, None


class Projection(nn.Module):
    """Linear layers that read the same x (..., in) as one, to (..., out); a 1x1 convolution of rows
    is one, too. Quantised, it takes x in float8 as well.
    """

    weight: Tensor
    bias: Tensor | None
    values: Tensor | None  # the weight in float8, (out, in), and a factor of each row, (1, out)
    scales: Tensor | None

    def __init__(self, *layers: Any) -> None:
        super().__init__()
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                expect(layer, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), groups=1)
            else:
                need(type(layer) is nn.Linear, f"a {type(layer).__name__} as a projection")
        weights = [layer.weight.flatten(1) for layer in layers]
        frozen(self, "weight", weights[0] if len(weights) == 1 else torch.cat(weights))
        biases = [layer.bias for layer in layers]
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            rows = [w.new_zeros(len(w)) if bias is None else bias for w, bias in pairs]
            frozen(self, "bias", rows[0] if len(rows) == 1 else torch.cat(rows))
        else:
            frozen(self, "bias", None)
        frozen(self, "values", None)
        frozen(self, "scales", None)

    def takes_float8(self) -> bool:
        """Returns True if the product in float8 exists: of bf16 weights, both sides multiples of
        16.
        """
        return self.weight.dtype == torch.bfloat16 and not any(n % 16 for n in self.weight.shape)

    def quantise(self) -> None:
        """Keeps the weight in float8 too, half of its bytes more; a step with a tape reads it in
        bf16.
        """
        values, scales = ops.quantise(self.weight)
        frozen(self, "values", values)
        frozen(self, "scales", scales.t())

    def forward(self, x: Tensor | ops.Quantised) -> Tensor:
        if isinstance(x, Tensor):
            return F.linear(x, self.weight, self.bias)
        assert self.values is not None
        assert self.scales is not None
        # sums in the tensor cores' own precision, as torchao's inference has it: beside the
        # rounding to float8 the difference is small, and exact sums take longer
        rows = torch._scaled_mm(
            x.values.flatten(0, -2),
            self.values.t(),
            x.scales.flatten(0, -2),
            self.scales,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return rows.unflatten(0, x.values.shape[:-1])

    def parts(self, x: Tensor | ops.Quantised, count: int) -> tuple[Tensor, ...]:
        """Returns the result in ``count`` equal parts of its columns."""
        if isinstance(x, Tensor) and is_taped(x):
            return _Parts.apply(x, self.weight, self.bias, count)
        return self(x).chunk(count, dim=-1)

    def without_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def add_to(self, x: Tensor, branch: Tensor) -> Tensor:
        """Returns x + branch W^T, without the bias, in x's own memory: the product adds what is
        there.
        """
        x.flatten(0, -2).addmm_(branch.flatten(0, -2), self.weight.t())
        return x
