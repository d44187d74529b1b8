"""GroupNorm with its shift and SiLU on NHWC at the first level of Stable Diffusion 1.5, and with a
skip connection beside it; forward, and with the gradient of the input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.registry import COMPILED, EAGER, OURS, Case, Variants
from dpfast.ops import group_norm
from dpfast.ops.group_norm.triton import bytes_moved

GROUPS, EPS = 32, 1e-5


def plain(*given: Tensor) -> Tensor:
    """What diffusers' residual block runs: given are the sources, weight, bias and shift."""
    *sources, weight, bias, shift = given
    x = torch.cat(sources, dim=1) + shift[:, :, None, None]
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def ours(*given: Tensor) -> Tensor:
    *sources, weight, bias, shift = given
    x = (sources[0], sources[1]) if len(sources) == 2 else sources[0]
    return group_norm(x, weight, bias, GROUPS, EPS, shift=shift, silu=True)


def _case(samples: int, channels: tuple[int, ...], side: int, backward: bool) -> Case:
    total, pixels = sum(channels), side * side

    def build(device: torch.device) -> Variants:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        def images(channels: int) -> Tensor:
            return random(samples, channels, side, side).to(memory_format=torch.channels_last)

        given = (*map(images, channels), random(total), random(total), random(samples, total))
        dy = images(total)
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)

        def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            if not backward:
                return (function(*given),)
            leaves = [source.detach().requires_grad_() for source in given[:-3]]
            return torch.autograd.grad(function(*leaves, *given[-3:]), leaves, dy)

        for made, rival in zip(run(ours), run(plain), strict=True):
            torch.testing.assert_close(made, rival, rtol=0.05, atol=0.05)
        return {
            EAGER: lambda: run(plain),
            COMPILED: lambda: run(compiled),
            OURS: lambda: run(ours),
        }

    moved = sum(bytes_moved(samples, channels, pixels, 2))
    if backward:
        moved += sum(bytes_moved(samples, channels, pixels, 2, backward=True))
    size = f"{samples} x {' + '.join(map(str, channels))} x {side}x{side}"
    return Case(
        operation="group_norm",
        size=f"{size}{', and to the input' if backward else ''}",
        tests="tests/ops/test_group_norm.py",
        build=build,
        bytes=moved,
        gpu_only=True,
    )


CASES = [
    _case(32, (320,), 64, backward=False),
    _case(16, (320,), 64, backward=True),
    _case(32, (1280, 640), 16, backward=False),
]
