"""The libraries' kernels behind attention and float8, at the sizes that published models have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfast import ops
from dpfast.generate.models.attention import attend
from dpfast.ops.quantise import HOPPER


@pytest.mark.parametrize("taped", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("keys", [256, 77])
@pytest.mark.parametrize("head_size", [40, 72, 80, 160, 512])
def test_some_kernel_takes_the_heads_of_every_model(head_size, keys, taped):
    """Views of joined projections, as fused blocks have them; the first of a table's row that can
    run, and no row ends in an error.
    """
    torch.manual_seed(0)
    width = 2 * head_size
    joined = torch.randn(2, 256, 3 * width, device="cuda", dtype=torch.bfloat16)
    parts = list(joined.chunk(3, dim=-1))
    parts[1:] = [part[:, :keys] for part in parts[1:]]
    q, k, v = (
        part.unflatten(-1, (2, head_size)).transpose(1, 2).detach().requires_grad_(taped)
        for part in parts
    )
    exact = [t.detach().double().requires_grad_(taped) for t in (q, k, v)]
    found, truth = [attend(q, k, v)], [F.scaled_dot_product_attention(*exact)]
    if taped:
        dout = torch.randn_like(found[0])
        found += torch.autograd.grad(found[0], (q, k, v), dout)
        truth += torch.autograd.grad(truth[0], exact, dout.double())
    for ours, right in zip(found, truth, strict=True):
        error = (ours.detach().double() - right.detach()).norm() / right.detach().norm()
        assert error < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("inside", "out"), [(1152, 4608), (4608, 1152), (1536, 1536)])
def test_products_in_float8_are_those_of_their_factors(inside, out, bias):
    """A row of tokens that is no multiple of a tile; what tensor cores sum has 14 bits or so."""
    if torch.cuda.get_device_capability() < HOPPER:
        pytest.skip("float8 with a factor for each row needs Hopper or later")
    projection = pytest.importorskip("dpfast.generate.models.fused.projection")
    torch.manual_seed(0)
    layer = nn.Linear(inside, out, bias=bias, device="cuda", dtype=torch.bfloat16)
    made = projection.Projection(layer)
    made.quantise()
    x = ops.quantise(torch.randn(2, 77, inside, device="cuda", dtype=torch.bfloat16))
    weight = made.values.double() * made.scales.t()
    exact = F.linear(
        x.values.double() * x.scales, weight, None if not bias else layer.bias.double()
    )
    error = (made(x).double() - exact).norm() / exact.norm()
    assert error < torch.finfo(torch.bfloat16).eps
