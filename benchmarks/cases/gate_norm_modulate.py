"""The gated residual, LayerNorm and modulation between two branches of DiT-XL/2's blocks; forward,
and with the gradients of the stream and the branch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.registry import COMPILED, EAGER, OURS, Case, Variants
from dpfast.ops import gate_norm_modulate
from dpfast.ops.gate_norm_modulate import backward_bytes_moved, bytes_moved

EPS = 1e-6
Pair = tuple[Tensor, Tensor]


def plain(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Pair:
    """What diffusers' block runs: the stream, and what its next branch gets."""
    stream = x + gate[:, None] * branch
    normed = F.layer_norm(stream, stream.shape[-1:], eps=EPS)
    return stream, normed * (1 + scale[:, None]) + shift[:, None]


def ours(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Pair:
    return gate_norm_modulate(x, branch, gate=gate, scale=scale, shift=shift, eps=EPS)


def _case(samples: int, tokens: int, channels: int, backward: bool) -> Case:
    def build(device: torch.device) -> Variants:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        streams = [random(samples, tokens, channels) for _ in range(2)]
        rows = [random(samples, channels) for _ in range(3)]
        seeds = [torch.randn_like(streams[0]) for _ in range(2)]
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)

        def run(function: Callable[..., Pair]) -> tuple[Tensor, ...]:
            if not backward:
                return function(*streams, *rows)
            leaves = [each.detach().requires_grad_() for each in streams]
            return torch.autograd.grad(function(*leaves, *rows), leaves, seeds)

        for made, rival in zip(run(ours), run(plain), strict=True):
            torch.testing.assert_close(made, rival, rtol=0.05, atol=0.1)
        return {
            EAGER: lambda: run(plain),
            COMPILED: lambda: run(compiled),
            OURS: lambda: run(ours),
        }

    elements = samples * tokens * channels
    moved = bytes_moved(elements, 2, branch=True)
    if backward:
        moved += backward_bytes_moved(elements, 2, stream=True, gate=True)
    size = f"{samples} x {tokens} x {channels}"
    return Case(
        operation="gate_norm_modulate",
        size=f"{size}{', and to stream and branch' if backward else ''}",
        tests="tests/ops/test_gate_norm_modulate.py",
        build=build,
        bytes=moved,
        gpu_only=True,
    )


CASES = [_case(64, 256, 1152, backward=False), _case(32, 256, 1152, backward=True)]
