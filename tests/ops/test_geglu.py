"""The gated activation: values and gradients against fp64, eagerly, under vjp and on the tape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import geglu
from tests.tolerances import HALF_ULP

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def truth(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx in fp64, the gradient by autograd."""
    wide = x.detach().double().requires_grad_()
    a, gate = wide.chunk(2, dim=-1)
    y = a * F.gelu(gate)
    (dx,) = torch.autograd.grad(y, wide, dy.double())
    return y.detach(), dx


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 10, 48, 320, 1280])
def test_matches_fp64(channels, dtype, device, backend):
    x = (2 * torch.randn(3, 5, 2 * channels)).to(device, dtype)
    dy = torch.randn(3, 5, channels).to(device, dtype)
    y, dx = truth(x, dy)
    # the reference rounds between its two operations, and its backward pass between three
    roundings = 4 if backend != "triton" else 1
    ulp = roundings * HALF_ULP[dtype]
    # in fp32 itself: triton 1.2e-7 relative, the reference 1.3e-6 absolute
    bounds = {"rtol": ulp + 2e-7, "atol": 3e-6 + (ulp if backend != "triton" else 0.0)}
    torch.testing.assert_close(geglu(x).double(), y, **bounds)
    taped = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(geglu(taped), taped, dy)
    torch.testing.assert_close(gradient.double(), dx, **bounds)
    _, backward = torch.func.vjp(geglu, x)
    assert torch.equal(backward(dy)[0], gradient)


def test_rows_of_any_strides_and_none_at_all(device):
    x = torch.randn(6, 4, 20, device=device)
    assert torch.equal(geglu(x.transpose(0, 1)), geglu(x.transpose(0, 1).contiguous()))
    assert geglu(x[:0]).shape == (0, 4, 10)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 5), InputError, r"x has shape \(3, 5\), expected \(..., 2 C\)"),
        (torch.zeros(()), InputError, "x has shape"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "x must be float32"),
    ],
    ids=["odd", "scalar", "integers"],
)
def test_what_it_cannot_use_is_named(x, error, message):
    with pytest.raises(error, match=message):
        geglu(x)
