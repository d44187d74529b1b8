"""Frozen linear layers: the values and gradients of PyTorch's own, eagerly, under vjp, compiled."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpfast.ops.frozen_linear import frozen_linear, reference


def layer(inside=24, out=96):
    """A weight (out, in), transposed in memory, and a bias (out,)."""
    return torch.randn(inside, out).t() / inside**0.5, torch.randn(out)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (3, 16, 24), (0, 16, 24)])
@pytest.mark.parametrize("differentiated", [False, True])
def test_values_are_those_of_pytorchs_layers(gelu, shape, differentiated):
    x, (weight, bias) = torch.randn(shape), layer()
    for given in (bias, None):
        made = frozen_linear(x.clone().requires_grad_(differentiated), weight, given, gelu=gelu)
        exact = reference(
            x.double(), weight.double(), None if given is None else given.double(), gelu
        )
        torch.testing.assert_close(made.detach().double(), exact, rtol=0, atol=2e-6)


def test_any_strides_are_read():
    x, (weight, bias) = torch.randn(24, 16, 5).permute(2, 1, 0), layer()
    for w in (weight, weight.contiguous()):
        made = frozen_linear(x, w, bias, gelu=True)
        torch.testing.assert_close(made, reference(x, w, bias, True), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("gelu", [False, True])
def test_gradient_by_autograd_and_under_vjp(gelu):
    x, (weight, bias) = torch.randn(4, 16, 24), layer()
    seed = torch.randn(4, 16, 96)
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(y, weight, bias, gelu), y, seed)
    (found,) = torch.autograd.grad(frozen_linear(y, weight, bias, gelu=gelu), y, seed)
    with torch.no_grad():
        value, backward = torch.func.vjp(lambda x: frozen_linear(x, weight, bias, gelu=gelu), x)
    torch.testing.assert_close(value, reference(x, weight, bias, gelu), rtol=1e-5, atol=2e-6)
    for gradient in (found, backward(seed)[0]):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-6)


def test_counters_see_its_flops():
    x, (weight, bias) = torch.randn(3, 16, 24), layer()
    with FlopCounterMode(display=False) as counter:
        frozen_linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 3 * 16 * 24 * 96


def test_other_dtypes_are_refused():
    weight, bias = layer()
    with pytest.raises(TypeError, match="x must be float32"):
        frozen_linear(torch.randn(2, 24).bfloat16(), weight, bias)
