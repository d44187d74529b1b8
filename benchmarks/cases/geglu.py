"""GEGLU at the first level of Stable Diffusion 1.5 and at the last one; forward, and with the
gradient of the input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.registry import COMPILED, EAGER, OURS, Case, Variants
from dpfast.ops import geglu
from dpfast.ops.geglu import bytes_moved


def plain(x: Tensor) -> Tensor:
    """What diffusers' feed-forward layer runs."""
    a, gate = x.chunk(2, dim=-1)
    return a * F.gelu(gate)


def _case(samples: int, tokens: int, channels: int, backward: bool) -> Case:
    def build(device: torch.device) -> Variants:
        x = torch.randn(samples, tokens, 2 * channels, device=device, dtype=torch.bfloat16)
        dy = torch.randn_like(x[..., :channels])
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)

        def run(function: Callable[[Tensor], Tensor]) -> Tensor:
            if not backward:
                return function(x)
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, dy)[0]

        torch.testing.assert_close(run(geglu), run(plain), rtol=0.05, atol=0.05)
        return {
            EAGER: lambda: run(plain),
            COMPILED: lambda: run(compiled),
            OURS: lambda: run(geglu),
        }

    elements = samples * tokens * channels
    passes = (False, True) if backward else (False,)
    return Case(
        operation="geglu",
        size=f"{samples} x {tokens} x {channels}{', and to the input' if backward else ''}",
        tests="tests/ops/test_geglu.py",
        build=build,
        bytes=sum(bytes_moved(elements, 2, backward=each) for each in passes),
        gpu_only=True,
    )


CASES = [
    _case(32, 4096, 1280, backward=False),
    _case(16, 4096, 1280, backward=True),
    _case(32, 256, 5120, backward=False),
]
