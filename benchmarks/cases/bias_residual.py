"""The end of a residual block, on NHWC: of the first level of Stable Diffusion 1.5, and of the last
one of its full decoder. The gradient launches nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.registry import COMPILED, EAGER, OURS, Case, Variants
from dpfast.ops import bias_residual


def plain(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """A convolution's bias, which PyTorch adds in a pass of its own, and the sum."""
    return (x + bias[:, None, None]) + residual


def _case(samples: int, channels: int, side: int) -> Case:
    def build(device: torch.device) -> Variants:
        def images() -> Tensor:
            made = torch.randn(samples, channels, side, side, device=device, dtype=torch.bfloat16)
            return made.to(memory_format=torch.channels_last)

        given = (images(), torch.randn(channels, device=device, dtype=torch.bfloat16), images())
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        torch.testing.assert_close(bias_residual(*given), plain(*given), rtol=0.05, atol=0.05)
        return {
            EAGER: lambda: plain(*given),
            COMPILED: lambda: compiled(*given),
            OURS: lambda: bias_residual(*given),
        }

    return Case(
        operation="bias_residual",
        size=f"{samples} x {channels} x {side}x{side}",
        tests="tests/ops/test_bias_residual.py",
        build=build,
        bytes=3 * samples * channels * side * side * 2,
        gpu_only=True,
    )


CASES = [_case(32, 320, 64), _case(4, 128, 512)]
