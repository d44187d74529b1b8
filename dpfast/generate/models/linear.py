"""A frozen generator's linear layers, replaced by ``dpfast.ops.frozen_linear`` on a CPU."""

from __future__ import annotations

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn

from dpfast.ops.frozen_linear import frozen_linear


class FrozenLinear(nn.Module):
    """``nn.Linear`` with weights that never change, followed by the tanh form of GELU if ``gelu``.

    Weights are kept transposed, (in, out) in memory. x (..., in) to (..., out), fp32;
    differentiable once, in x only.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().t().contiguous().t())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias, gelu=self.gelu)


def freeze_linear(model: nn.Module) -> nn.Module:
    """Replaces the linear layers of ``model`` in place where they are fp32 on a CPU, and returns
    it.
    """
    if not torch.backends.mkldnn.is_available():
        return model
    for name, child in list(model.named_children()):
        gelu = type(child) is GELU and child.approximate == "tanh"
        linear = child.proj if gelu else child
        if (
            type(linear) is nn.Linear
            and linear.weight.dtype == torch.float32
            and linear.weight.device.type == "cpu"
        ):
            setattr(model, name, FrozenLinear(linear, gelu=gelu))
        else:
            freeze_linear(child)
    return model
