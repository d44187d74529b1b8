"""Images that are not finite, which would be rounded to black ones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.decoder import AutoencoderDecoder
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.planning.architectures import without_weights
from tests.generate.standin import StandInRecorder


def changed(source, folder, part, change, **config):
    """A copy of a pipeline folder in which a part has other weights and another configuration."""
    shutil.copytree(source, folder)
    weights = folder / part / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    file = folder / part / "config.json"
    known = json.loads(file.read_text(encoding="utf-8")) | config
    kept = {name: value for name, value in known.items() if value is not ...}
    file.write_text(json.dumps(kept), encoding="utf-8")
    return folder


def large(weights):
    """Activations beyond the largest float16, which a group norm brings back in float32."""
    return weights | {"decoder.conv_in.weight": weights["decoder.conv_in.weight"] * 1e7}


@pytest.fixture(params=["vae", "tiny_decoder"])
def says_upcast(request, pipeline_folder, tmp_path):
    change = large if request.param == "vae" else dict
    return request.param, changed(
        pipeline_folder, tmp_path / "upcast", request.param, change, force_upcast=True
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_decoder_that_asks_for_float32_has_it(dtype, says_upcast):
    part, folder = says_upcast
    half, full = (Pipeline.from_pretrained(folder, dtype=name) for name in (dtype, "float32"))
    decoder = half.decoder if part == "vae" else half.guidance_decoder
    assert (half.denoiser.dtype, decoder.dtype) == (getattr(torch, dtype), torch.float32)
    latents = torch.randn(2, 4, 8, 8)
    same = full.decoder if part == "vae" else full.guidance_decoder
    assert torch.equal(decoder(latents), same(latents))
    planned = without_weights(folder, dtype=getattr(torch, dtype))
    assert planned.denoiser.dtype == getattr(torch, dtype)
    assert (planned.decoder if part == "vae" else planned.guidance_decoder).dtype == torch.float32


@pytest.mark.parametrize("said", [False, ...], ids=["false", "not said"])
def test_a_decoder_that_does_not_ask_runs_in_the_dtype_of_the_others(
    said, pipeline_folder, tmp_path
):
    folder = changed(pipeline_folder, tmp_path / "plain", "vae", dict, force_upcast=said)
    assert Pipeline.from_pretrained(folder, dtype="bfloat16").decoder.dtype == torch.bfloat16
    assert without_weights(folder, dtype=torch.bfloat16).decoder.dtype == torch.bfloat16


def test_a_live_autoencoder_keeps_its_weights_where_it_asks_for_float32(tiny_pipelines):
    live = tiny_pipelines.vae(force_upcast=True).half()
    decoder = AutoencoderDecoder(live)
    assert (live.dtype, decoder.dtype) == (torch.float16, torch.float32)
    silent = tiny_pipelines.vae().half()
    assert AutoencoderDecoder(silent).model is silent


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("guided", [False, True])
def test_images_that_are_not_finite_stop_the_batch(
    guided, graphs, pipeline_folder, learner, tmp_path
):
    folder = changed(pipeline_folder, tmp_path / "overflows", "vae", large, force_upcast=False)
    sampler = GuidedSampler.from_pretrained(
        folder,
        learner if guided else None,
        dtype="float16",
        guidance=GuidanceConfig(omega=0.1, every=1),
        steps=2,
        compile=False,
        cuda_graphs=StandInRecorder() if graphs else None,
    )
    message = r"dtype = 'float16': the decoder gives images that are not finite, .* \(ids 7, 9\)"
    with pytest.raises(InputError, match=message):
        sampler.generate([0, 1], [7, 9])
    with pytest.raises(InputError, match="for 2 samples"):
        list(sampler.stream([0, 1], batch_size=2))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_that_are_not_finite_are_the_denoisers(dtype, pixel_folder, tmp_path):
    """Also without a decoder, of a model in pixel space, and by weights that are NaN."""

    def broken(weights):
        value = 1e5 if dtype == "float16" else float("nan")
        return weights | {"conv_out.bias": torch.full_like(weights["conv_out.bias"], value)}

    folder = changed(pixel_folder, tmp_path / "broken", "unet", broken)
    sampler = GuidedSampler.from_pretrained(folder, dtype=dtype, steps=2, compile=False)
    with pytest.raises(InputError, match=f"'{dtype}': the denoiser gives latents that are not"):
        sampler.generate([0])


def test_one_sample_that_is_not_finite_is_named_and_what_fills_a_batch_is_not(pipeline):
    """A prepared batch is filled with copies of its last sample."""
    sampler = GuidedSampler(pipeline, steps=2, compile=False, cuda_graphs=StandInRecorder())
    sampler.generate([0, 1, 2, 0])
    state = sampler.advance(sampler.begin([0, 1], [5, 6]))
    state.x[1, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match=r"for 1 samples of the batch \(ids 6\)"):
        sampler.finish(state)
    state.x[1] = state.x[0]
    assert len(sampler.finish(state)) == 2
