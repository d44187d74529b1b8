"""The full decoder's gradient survives compilation."""

import pytest
import torch

from dpfast.errors import InputError
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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scaling_factor": 0.0}, "scaling_factor = 0.0"),
        ({"shift_factor": "x"}, "shift_factor = 'x': expected finite numbers"),
        ({"scaling_factor": float("nan")}, "scaling_factor = nan"),
        ({"scaling_factor": [0.5, 0.5]}, "scaling_factor = .*: expected one number"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std"),
        ({"latents_std": []}, "latents_std = .*: expected one number or 4, one a channel"),
        ({"latents_mean": [0.0, 0.0]}, "latents_mean = .*: expected one number or 4"),
    ],
    ids=["zero", "text", "nan", "factors", "deviation", "no deviations", "too few means"],
)
def test_a_scale_that_no_latent_has_is_named(changes, named):
    model = tiny_pipelines.vae()
    model.register_to_config(**changes)
    with pytest.raises(InputError, match=named):
        VaeDecoder(model)


def test_a_decoder_is_made_where_tensors_hold_no_values():
    with torch.device("meta"):
        model = tiny_pipelines.vae()
    assert VaeDecoder(model)._unscale.scale.is_meta
