"""A plan follows what a recipe says of its generator: where it lies, its size, its prompts."""

import json

import huggingface_hub.constants
import pytest
import torch

from dpfast.config import Generator
from dpfast.errors import InputError
from dpfast.generate.from_recipe import load_pipeline
from dpfast.generate.models.decoder import TinyDecoder
from dpfast.planning.architectures import pipeline_of
from tests import tiny_pipelines
from tests.hub_cache import cached
from tests.tiny_pipelines import NAMES


def test_a_plan_has_the_shapes_of_the_pipeline_that_is_loaded(
    stable_diffusion_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", "someone/tiny", stable_diffusion_folder)
    tiny_pipelines.tiny_vae().save_pretrained(tmp_path / "taesd")
    (tmp_path / "prompts.json").write_text(json.dumps({"cat": ["a", "b"], "*": "a {}"}))
    generator = Generator(
        pipeline="someone/tiny",
        class_names=NAMES,
        height=24,
        width=8,
        prompts=str(tmp_path / "prompts.json"),
        tiny_decoder=str(tmp_path / "taesd"),
    )
    loaded, planned = load_pipeline(generator, device="cpu"), pipeline_of(generator)
    assert planned.denoiser.sample_shape == loaded.denoiser.sample_shape == (4, 12, 4)
    assert len(planned.denoiser.embeddings) == len(loaded.denoiser.embeddings) == 5
    for pipeline, device in ((loaded, "cpu"), (planned, "meta")):
        assert isinstance(pipeline.guidance_decoder, TinyDecoder)
        latents = torch.zeros(1, 4, 12, 4, device=device)
        assert pipeline.guidance_decoder(latents).shape == (1, 1, 24, 8)


def test_published_architectures_are_counted_at_the_size_that_is_asked_for():
    small = pipeline_of(Generator(pipeline="stable-diffusion-1.5", height=256, width=256))
    assert small.denoiser.sample_shape == (4, 32, 32)
    with pytest.raises(InputError, match=r"height = 256: the published .* for squares alone"):
        pipeline_of(Generator(pipeline="stable-diffusion-1.5", height=256))
