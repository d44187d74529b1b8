"""cuDNN's fused convolutions, which only a GPU has and only where bits need not repeat."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from dpfast.ops import relu_chain

NHWC = torch.channels_last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_convolutions_match_fp64_whatever_their_memory_held(dtype):
    """Without a residual PyTorch hands cuDNN the unwritten result in its place, times zero."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 32, 32, device="cuda", dtype=dtype).to(memory_format=NHWC)
    widths = (4, 64, 64, 64)
    weights = [
        (torch.randn(b, a, 3, 3, device="cuda") / (9 * a) ** 0.5).to(dtype, memory_format=NHWC)
        for a, b in itertools.pairwise(widths)
    ]
    biases = [torch.randn(64, device="cuda", dtype=dtype) for _ in weights]
    order = (-1, -1, 1)
    exact = relu_chain(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], order
    )
    poison = [torch.full((2, 64, 32, 32), torch.nan, device="cuda", dtype=dtype) for _ in range(8)]
    del poison
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fused kernel
        found = relu_chain(x, weights, biases, order)
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps
