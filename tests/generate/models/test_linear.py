"""Frozen linear layers: the values and gradients of PyTorch's own, eagerly, under vjp and
compiled.
"""

import copy

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn

from dpfast.generate.models.linear import FrozenLinear, freeze_linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)


def block(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(24, 40), GELU(40, 96, approximate="tanh"), nn.Linear(96, 24, bias=False)
    )
    return layers.to(dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    plain = block()
    return plain, freeze_linear(copy.deepcopy(plain))


@needs_onednn
def test_every_linear_layer_and_the_gelu_behind_one_are_replaced(pair):
    assert [type(layer) for layer in pair[1]] == [FrozenLinear] * 3
    assert [layer.gelu for layer in pair[1]] == [False, True, False]


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 24), (3, 16, 24), (0, 16, 24)])
def test_values_are_those_of_the_layers_they_replace(pair, shape):
    plain, frozen = pair
    x = torch.randn(shape)
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.no_grad():
        fused = frozen(x)
    for made in (fused, frozen(x)):
        torch.testing.assert_close(made.double(), exact, rtol=0, atol=2e-6)


@needs_onednn
def test_strided_input(pair):
    x = torch.randn(24, 16, 5).permute(2, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(pair[1](x), pair[0](x), rtol=1e-5, atol=2e-6)


@needs_onednn
def test_gradient_by_autograd_and_under_vjp(pair):
    plain, frozen = pair
    x, seed = torch.randn(4, 16, 24), torch.randn(4, 16, 24)
    (expected,) = torch.autograd.grad(plain(y := x.clone().requires_grad_()), y, seed)
    (by_autograd,) = torch.autograd.grad(frozen(y := x.clone().requires_grad_()), y, seed)
    with torch.no_grad():
        value, backward = torch.func.vjp(frozen, x)
    torch.testing.assert_close(value, plain(x), rtol=1e-5, atol=2e-6)
    for gradient in (by_autograd, backward(seed)[0]):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=2e-6)


@needs_onednn
def test_one_full_graph_with_the_vjp_inside(pair):
    plain, frozen = pair

    def gradient(model, x):
        with torch.no_grad():
            value, backward = torch.func.vjp(lambda x: model(2 * x), x)
            return value + model(x), backward(torch.ones_like(value))[0]

    x = torch.randn(4, 16, 24)
    made = torch.compile(gradient, fullgraph=True)(frozen, x)
    for ours, exact in zip(made, gradient(plain, x), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_other_dtypes_keep_pytorchs_layers():
    assert not any(
        isinstance(layer, FrozenLinear) for layer in freeze_linear(block(torch.bfloat16)).modules()
    )
