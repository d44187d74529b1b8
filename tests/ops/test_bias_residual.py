"""The end of a residual block: its values against fp64, its gradient that of the result."""

from __future__ import annotations

import pytest
import torch

from dpfast.errors import InputError
from dpfast.ops import bias_residual
from tests.tolerances import HALF_ULP

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NHWC = torch.channels_last


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 10, 3, 5), (2, 48, 8, 8), (1, 320, 8, 8)])
def test_matches_fp64_in_both_layouts(shape, dtype, device, backend):
    x, residual = (torch.randn(shape).to(device, dtype) for _ in range(2))
    bias = torch.randn(shape[1]).to(device)
    exact = x.double() + bias.double()[:, None, None] + residual.double()
    ulp = HALF_ULP[dtype]
    bounds = {"rtol": ulp, "atol": 1e-6 if backend == "triton" else 8 * ulp}
    for first, second in ((x, residual), (x.to(memory_format=NHWC), residual)):
        torch.testing.assert_close(bias_residual(first, bias, second).double(), exact, **bounds)


def test_the_gradient_of_both_is_that_of_the_result(device):
    x, residual, dy = (torch.randn(2, 12, 4, 4, device=device) for _ in range(3))
    bias = torch.randn(12, device=device, requires_grad=True)
    given = x.clone().requires_grad_(), residual.clone().requires_grad_()
    y = bias_residual(given[0], bias, given[1])
    dx, dresidual, dbias = torch.autograd.grad(y, (*given, bias), dy, allow_unused=True)
    assert torch.equal(dx, dy)
    assert torch.equal(dresidual, dy)
    assert dbias is None  # frozen
    _, backward = torch.func.vjp(lambda x, r: bias_residual(x, bias, r), x, residual)
    assert torch.equal(torch.stack(backward(dy)), torch.stack((dy, dy)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, InputError, "x has shape"),
        ({"bias": torch.zeros(5)}, InputError, r"bias has shape \(5,\), expected \(4,\)"),
        ({"residual": torch.zeros(2, 4, 3, 1)}, InputError, "residual has shape"),
        ({"residual": torch.zeros(2, 4, 3, 3).half()}, TypeError, "residual must be float32"),
    ],
    ids=["x", "bias", "residual", "dtype"],
)
def test_what_it_cannot_use_is_named(changes, error, message):
    x = torch.zeros(2, 4, 3, 3)
    with pytest.raises(error, match=message):
        bias_residual(**({"x": x, "bias": torch.zeros(4), "residual": x} | changes))
