"""Resizing by products: torch's antialiased values, and the transposed products as its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dpfast.generate.resizing import by_products, triangles

SIZES = [((32, 32), (7, 5)), ((9, 16), (32, 20)), ((64, 48), (63, 49)), ((5, 5), (5, 5))]


@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_values_and_gradients_are_those_of_torch(source, target) -> None:
    x = torch.randn(2, 3, *source, requires_grad=True)
    right = F.interpolate(x, target, mode="bilinear", antialias=True)
    seed = torch.randn_like(right)
    (gradient,) = torch.autograd.grad(right, x, seed)
    torch.testing.assert_close(by_products(x, target), right, rtol=0, atol=2e-6)
    _, backward = torch.func.vjp(lambda x: by_products(x, target), x.detach())
    torch.testing.assert_close(backward(seed)[0], gradient, rtol=0, atol=5e-6)


def test_a_grey_image_stays_grey() -> None:
    assert torch.allclose(triangles(512, 224, torch.device("cpu")).sum(1), torch.ones(224))
    grey = torch.full((1, 3, 512, 512), 0.25)
    torch.testing.assert_close(by_products(grey, (224, 224)), torch.full((1, 3, 224, 224), 0.25))
