"""Loading a pipeline folder: every missing or unsafe part is named."""

import importlib.util
import json
import shutil

import pytest
import torch

from dpfast.config import RecipeError
from dpfast.generate.pipeline import Pipeline


@pytest.fixture
def broken(pipeline_folder, tmp_path):
    return shutil.copytree(pipeline_folder, tmp_path / "broken")


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler"])
def test_a_missing_part_is_named(broken, part):
    shutil.rmtree(broken / part)
    with pytest.raises(RecipeError, match=f"no part '{part}'"):
        Pipeline.from_pretrained(broken)


def test_a_folder_that_is_no_pipeline_is_refused(broken, tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        Pipeline.from_pretrained(tmp_path / "missing")
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(RecipeError, match="FluxPipeline"):
        Pipeline.from_pretrained(broken)
    (broken / "model_index.json").unlink()
    with pytest.raises(RecipeError, match=r"model_index\.json"):
        Pipeline.from_pretrained(broken)


def test_pickled_weights_are_refused(broken):
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({"weight": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(RecipeError, match=r"'vae' has no \.safetensors weights; pickled"):
        Pipeline.from_pretrained(broken)


def test_xformers_is_selectable_and_missed_by_name(pipeline_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xformers" else find(name))
    with pytest.raises(RecipeError, match=r"attention = 'xformers'.*pip install"):
        Pipeline.from_pretrained(pipeline_folder, attention="xformers")


def test_without_a_tiny_decoder_the_full_one_guides(broken):
    shutil.rmtree(broken / "tiny_decoder")
    pipeline = Pipeline.from_pretrained(broken)
    assert pipeline.guidance_decoder is pipeline.decoder


def test_a_learned_variance_is_cut_off(pipeline):
    """A model of twice the channels, as DiT-XL/2 has: the prediction is its first half."""
    model = pipeline.denoiser.model
    double = type(model)(**{**model.config, "out_channels": 8})
    denoiser = type(pipeline.denoiser)(double, classes=3, prediction="epsilon")
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor(5), torch.tensor([0, 1])
    assert denoiser(x, t, labels).shape == x.shape


def test_names_and_shapes_come_from_the_folder(pipeline):
    assert pipeline.class_names == ("cat", "dog", "red bicycle")
    assert pipeline.denoiser.classes == 3
    assert pipeline.denoiser.sample_shape == (4, 8, 8)
    assert pipeline.denoiser.prediction == "epsilon"
    assert pipeline.image_channels == 1
