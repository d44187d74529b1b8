"""The full decoder's gradient survives compilation."""

import diffusers
import pytest
import torch

from dpfast.errors import InputError
from dpfast.generate.models.decoder import TinyDecoder, VaeDecoder, times_a_tiny_one
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware.flops import count_passes
from dpfast.planning.architectures import VAE
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


def test_what_guidance_costs_without_a_tiny_decoder_is_said_once(tmp_path, learner, caplog):
    """The ratio is that of the passes which torch's counter counts in the two decoders."""
    folder = tiny_pipelines.dit(tmp_path / "dit", tiny=False)
    tiny_pipelines.tiny_vae().save_pretrained(tmp_path / "tiny")
    pipeline = Pipeline.from_pretrained(folder)
    x = torch.randn(1, 4, 8, 8)
    small = TinyDecoder(
        diffusers.AutoencoderTiny(
            out_channels=1,
            encoder_block_out_channels=(64, 64),
            decoder_block_out_channels=(64, 64),
            num_encoder_blocks=(3, 3),
            num_decoder_blocks=(3, 1),
        )
    )
    times = count_passes(pipeline.decoder, x).both / count_passes(small, x).both
    assert times_a_tiny_one(pipeline.decoder, (4, 8, 8)) == pytest.approx(times, rel=0.05)
    with caplog.at_level("INFO", logger="dpfast.generate.preflight"):
        for _ in range(2):
            GuidedSampler(pipeline, learner, compile=False)
        GuidedSampler(pipeline, None, compile=False)
        GuidedSampler(
            Pipeline.from_pretrained(folder, tiny_decoder=tmp_path / "tiny"), learner, compile=False
        )
    (said,) = [each for each in caplog.messages if "no tiny decoder" in each]
    assert f"{times:.0f} times the FLOPs" in said


def test_the_full_decoder_of_stable_diffusion_costs_eighteen_times_a_tiny_one():
    """TAESD, at 512 px."""
    with torch.device("meta"):
        decoder = VaeDecoder(diffusers.AutoencoderKL(**VAE))
    assert times_a_tiny_one(decoder, (4, 64, 64)) == pytest.approx(17.8, abs=0.05)
