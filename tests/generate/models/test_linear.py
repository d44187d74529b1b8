"""A generator with frozen linear layers computes what it did with PyTorch's own."""

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
