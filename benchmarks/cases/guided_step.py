"""The guided DDIM update of 256 latents of 4 x 64 x 64: without and with noise, and anchored."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.registry import (
    COMPILED,
    EAGER,
    OURS,
    OURS_OUT,
    Case,
    Variants,
)
from dpfast.ops import guided_step, normal

SHAPE = (256, 4, 64, 64)
CFG_SCALE, OMEGA = 4.0, 0.05
ROW = (0.8, 0.6, 0.9, 0.41, 0.0, 0.0)  # alpha, sigma, a, b, c, d
NOISE = 0.14
KAPPA = 0.5


def _norm(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1)[:, None, None, None]


def plain(
    x: Tensor, cond: Tensor, uncond: Tensor, grad: Tensor, noise: float, anchor: float = 0.0
) -> Tensor:
    """What one would write by hand; its noise is torch's own and depends on the batch."""
    alpha, sigma, a, b, _, _ = ROW
    eps = uncond + CFG_SCALE * (cond - uncond)
    size, length = _norm(x), _norm(grad)
    moved = x + OMEGA * size / (length + 1e-8) * grad
    if anchor:
        label = uncond - cond
        toward = grad / length + anchor * label / _norm(label)
        moved = x + OMEGA * size / _norm(toward) * toward
    x0 = (moved - sigma * eps) / alpha
    following = a * x0 + b * eps
    return following + noise * torch.randn_like(x) if noise else following


def _case(size: str, noise: float, targets: dict[str, float], anchor: float = 0.0) -> Case:
    def build(device: torch.device) -> Variants:
        inputs = [torch.randn(SHAPE, device=device) for _ in range(4)]
        table = torch.tensor([(*ROW[:5], noise)], device=device)
        ids = torch.arange(SHAPE[0], device=device) if noise else None
        out = torch.empty(SHAPE, device=device)
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)

        def ours(out: Tensor | None = None) -> Tensor:
            options = {"cfg_scale": CFG_SCALE, "omega": OMEGA, "anchor": anchor}
            return guided_step(*inputs, table, 0, **options, sample_ids=ids, out=out)

        drawn = 0 if ids is None else noise * normal(ids, SHAPE[1:], seed=0, stream=1)
        torch.testing.assert_close(
            ours(), plain(*inputs, 0.0, anchor) + drawn, rtol=1e-5, atol=1e-5
        )
        if not noise:
            torch.testing.assert_close(
                ours(), compiled(*inputs, noise, anchor), rtol=1e-5, atol=1e-5
            )
        return {
            EAGER: lambda: plain(*inputs, noise, anchor),
            COMPILED: lambda: compiled(*inputs, noise, anchor),
            OURS: ours,
            OURS_OUT: lambda: ours(out),
        }

    # Five passes: x, two predictions and the gradient read, the result written.
    elements = torch.Size(SHAPE).numel()
    return Case(
        operation="guided_step",
        size=size,
        tests="tests/ops/test_guided_step.py",
        build=build,
        bytes=5 * 4 * elements,
        targets=targets,
    )


CASES = [
    _case(
        "CFG, relative, eta 0, 256 x 4x64x64 fp32", 0.0, {EAGER: 20, COMPILED: 1.3, "copy": 0.85}
    ),
    _case("CFG, relative, eta 1 with noise, 256 x 4x64x64 fp32", NOISE, {EAGER: 10, COMPILED: 2}),
    _case(
        "CFG, relative, eta 0, anchor, 256 x 4x64x64 fp32",
        0.0,
        {EAGER: 20, COMPILED: 1.3},
        KAPPA,
    ),
]
