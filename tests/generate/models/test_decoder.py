"""The full decoder's gradient survives compilation."""

import torch

from dpfast.generate.models.decoder import VaeDecoder
from tests import tiny_pipelines


def test_the_compiled_gradient_through_the_full_decoder_is_the_eager_one():
    """torch.compile (2.13, CPU) gave zero through nearest upsampling under torch.func.vjp;
    repeating does not.
    """
    decoder, x = VaeDecoder(tiny_pipelines.vae()), torch.randn(2, 4, 8, 8)

    def gradient(x):
        images, backward = torch.func.vjp(decoder, x)
        return backward(images.cos())[0]

    with torch.no_grad():
        expected = gradient(x)
        got = torch.compile(gradient, fullgraph=True)(x)
    assert float(expected.norm()) > 1e-3
    assert float((got - expected).norm() / expected.norm()) < 1e-4
