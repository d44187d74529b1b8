"""Chains of convolutions and ReLUs: values and gradients against fp64, with and without
residuals.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.errors import InputError
from dpfast.hardware.traffic import count_traffic
from dpfast.ops import relu_chain
from dpfast.ops.relu_chain import _derivative, _operation
from tests.tolerances import HALF_ULP

NHWC = torch.channels_last
# 4 channels, then 10: a convolution alone, and two blocks of two that add what goes in
WIDTHS, RESIDUALS = (4, 10, 10, 10, 10, 10), (-1, -1, 1, -1, 3)


def chain(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[list, list]:
    pairs = list(zip(WIDTHS[1:], WIDTHS, strict=False))
    weights = [torch.randn(b, a, 3, 3).div((9 * a) ** 0.5).to(device, dtype) for b, a in pairs]
    biases = [torch.randn(b).to(device, dtype) for b, _ in pairs]
    return weights, biases


def plain(x: Tensor, weights: list, biases: list) -> Tensor:
    results = [x]
    for weight, bias, source in zip(weights, biases, RESIDUALS, strict=True):
        z = F.conv2d(results[-1], weight, bias, padding=1)
        results.append(F.relu(z if source < 0 else z + results[source]))
    return results[-1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 3, 5), (1, 4, 16, 8)], ids=str)
def test_matches_fp64_with_and_without_a_tape_and_under_vjp(shape, layout, device, backend):
    x = torch.randn(shape, device=device).to(memory_format=layout)
    given = chain(device=device)
    exact_x = x.double().requires_grad_()
    exact = plain(exact_x, *([t.double() for t in part] for part in given))
    dy = torch.randn(exact.shape, device=device)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    taped = x.clone().requires_grad_()
    y = relu_chain(taped, *given, RESIDUALS)
    (dx,) = torch.autograd.grad(y, taped, dy)
    again, backward = torch.func.vjp(lambda x: relu_chain(x, *given, RESIDUALS), x)
    for found in (y, again, relu_chain(x, *given, RESIDUALS)):
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-6)
    for found in (dx, backward(dy)[0]):
        torch.testing.assert_close(found.double(), exact_dx, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_are_no_further_from_fp64_than_pytorch(dtype, device, backend):
    torch.manual_seed(3)
    x = torch.randn(2, 4, 8, 8).to(device, dtype)
    given, dy = chain(dtype, device), torch.randn(2, 10, 8, 8).to(device, dtype)

    def both(function, x, *rest):
        x = x.clone().requires_grad_()
        y = function(x, *rest)
        return y.detach().double(), torch.autograd.grad(y, x, dy.to(x.dtype))[0].double()

    exact = both(plain, x.double(), *([t.double() for t in part] for part in given))
    theirs = both(plain, x, *given)
    ours = both(lambda *a: relu_chain(*a, RESIDUALS), x, *given)
    for a, b, right in zip(ours, theirs, exact, strict=True):
        # a half unit in the last place more: the interpreter truncates
        assert (a - right).norm() <= (1.1 * (b - right).norm() + HALF_ULP[dtype] * right.norm())


def test_a_residual_of_several_convolutions_and_one_of_none(device):
    """Results that are added twice, and one that nothing reads but its own convolution."""
    x = torch.randn(2, 3, 4, 4, device=device)
    weights = [torch.randn(3, 3, 3, 3, device=device) / 5 for _ in range(3)]
    biases = [torch.randn(3, device=device) for _ in range(3)]
    for order in ((0, 0, 0), (-1, 1, 1), (0, 1, 2), (-1, -1, -1)):

        def right(x, order=order):
            results = [x]
            for w, b, r in zip(weights, biases, order, strict=True):
                z = F.conv2d(results[-1], w, b, padding=1)
                results.append(F.relu(z if r < 0 else z + results[r]))
            return results[-1]

        dy = torch.randn_like(x)
        ways = (
            torch.func.vjp(function, x)
            for function in (lambda x: relu_chain(x, weights, biases, order), right)  # noqa: B023
        )
        (y, ours), (z, theirs) = ways
        torch.testing.assert_close(y, z, rtol=0, atol=4e-6)
        torch.testing.assert_close(ours(dy)[0], theirs(dy)[0], rtol=0, atol=4e-6)
        torch.testing.assert_close(relu_chain(x, weights, biases, order), z, rtol=0, atol=4e-6)


def test_the_registered_operations_promise_what_they_do(device, backend):
    x = torch.randn(2, 4, 3, 5, device=device)
    weights, biases = chain(device=device)
    y = _operation(x, weights[0], biases[0], None)
    for given in ((x, weights[0], biases[0], None), (y, weights[1], biases[1], y)):
        torch.library.opcheck(_operation, given)
    if backend == "triton":
        for more in (None, y):
            torch.library.opcheck(_derivative, (torch.randn_like(y), y, more))


def test_its_traffic_is_that_of_the_formula():
    given = [[t.to("meta", memory_format=NHWC) for t in chain()[0]], []]
    given[1] = [t.to("meta") for t in chain()[1]]
    with torch.device("meta"):
        x, dy = (torch.empty(2, c, 8, 8).to(memory_format=NHWC) for c in (4, 10))
    x.requires_grad_()
    found = count_traffic(lambda: torch.autograd.grad(relu_chain(x, *given, RESIDUALS), x, dy))
    wide, narrow, weights = 4 * dy.numel(), 4 * x.numel(), [4 * w.numel() for w in given[0]]
    assert [(k.kind, k.bytes) for k in found.kernels] == [
        ("product", narrow + wide + weights[0]),
        *[("product", (3 if r > 0 else 2) * wide + weights[1]) for r in RESIDUALS[1:]],
        *[("pointwise", 3 * wide), ("product", 2 * wide + weights[1])] * 2,
        *[("pointwise", 4 * wide), ("product", 2 * wide + weights[1])],
        *[("pointwise", 3 * wide), ("product", 2 * wide + weights[1])],
        *[("pointwise", 4 * wide), ("product", narrow + wide + weights[0])],
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, 4)}, InputError, "x has shape"),
        ({"weights": [torch.zeros(4, 4, 1, 1)]}, InputError, r"weights\[0\] has shape"),
        ({"weights": [torch.zeros(())]}, InputError, r"weights\[0\] has shape \(\)"),
        ({"weights": [torch.zeros(4, 4, 3, 3).half()]}, TypeError, r"weights\[0\] must be float32"),
        ({"biases": [torch.zeros(5)]}, InputError, r"biases\[0\] has shape \(5,\), expected \(4,"),
        ({"biases": []}, InputError, "1 weights, 0 biases and 1 residuals"),
        ({"residuals": (1,)}, InputError, r"residuals\[0\] = 1: expected -1, or a result from 0"),
        ({"weights": [torch.zeros(5, 4, 3, 3)], "biases": [torch.zeros(5)]}, InputError, "= 0: "),
    ],
    ids=["x", "kernel size", "scalar", "dtype", "bias", "none", "not made yet", "channels"],
)
def test_what_it_cannot_use_is_named(changes, error, message):
    given = {
        "x": torch.zeros(2, 4, 3, 3),
        "weights": [torch.zeros(4, 4, 3, 3)],
        "biases": [torch.zeros(4)],
        "residuals": (0,),
    }
    with pytest.raises(error, match=message):
        relu_chain(**given | changes)
