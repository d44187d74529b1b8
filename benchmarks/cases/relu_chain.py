"""A block of a tiny decoder with its gradient, on NHWC: of the last level at 512 pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.registry import COMPILED, EAGER, OURS, Case, Variants
from dpfast.ops import relu_chain


def plain(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    h = F.relu(F.conv2d(x, weights[0], biases[0], padding=1))
    h = F.relu(F.conv2d(h, weights[1], biases[1], padding=1))
    return F.relu(F.conv2d(h, weights[2], biases[2], padding=1) + x)


def fused(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return relu_chain(x, weights, biases, (-1, -1, 0))


def _case(samples: int, channels: int, side: int) -> Case:
    def build(device: torch.device) -> Variants:
        def of(*shape: int) -> Tensor:
            made = torch.randn(*shape, device=device, dtype=torch.bfloat16)
            return made.to(memory_format=torch.channels_last)

        x, dy = (of(samples, channels, side, side) for _ in range(2))
        x.requires_grad_()
        weights = [of(channels, channels, 3, 3) / (9 * channels) ** 0.5 for _ in range(3)]
        biases = [torch.randn(channels, device=device, dtype=torch.bfloat16) for _ in range(3)]
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        ours, theirs = fused(x, weights, biases), plain(x, weights, biases)
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)

        def gradient(function: Callable[..., Tensor]) -> object:
            return torch.autograd.grad(function(x, weights, biases), x, dy)

        return {
            EAGER: lambda: gradient(plain),
            COMPILED: lambda: gradient(compiled),
            OURS: lambda: gradient(fused),
        }

    return Case(
        operation="relu_chain",
        size=f"{samples} x {channels} x {side}x{side}, gradient",
        tests="tests/ops/test_relu_chain.py",
        build=build,
        gpu_only=True,
    )


CASES = [_case(16, 64, 512)]
