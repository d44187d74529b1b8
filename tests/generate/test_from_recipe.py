"""Recipes: every field of [generator] and [guidance] reaches the pipeline or the sampler."""

import dataclasses
import inspect

import pytest
import torch

from dpfast.config import Recipe
from dpfast.errors import InputError
from dpfast.generate import from_recipe as recipes
from dpfast.generate.from_recipe import load_pipeline, new_sampler
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from tests.tiny_pipelines import NAMES

FIELDS = {
    "solver": "dpmpp2m",
    "steps": 6,
    "cfg_scale": 2.0,
    "cfg_interval": (0.25, 0.75),
    "omega": 0.1,
    "every": 2,
    "start": 0.1,
    "until": 0.9,
    "mode": "score",
    "criterion": "margin",
    "seed": 5,
    "cache_interval": 3,
    "compile_region": "blocks",
}


def load(**overrides):
    return Recipe.load("fashion", **overrides)


def test_a_text_pipeline_gets_its_prompts_dtype_and_names_from_the_recipe(stable_diffusion_folder):
    asked = {
        "class_names": ", ".join(NAMES),
        "prompt_template": "a red photo of a {}",
        "dtype": "bfloat16",
    }
    pipeline = load_pipeline(
        load(pipeline=str(stable_diffusion_folder), **asked).generator, device="cpu"
    )
    wanted = Pipeline.from_pretrained(
        stable_diffusion_folder,
        class_names=NAMES,
        prompt_template=asked["prompt_template"],
        dtype=torch.bfloat16,
    )
    assert pipeline.class_names == tuple(NAMES)
    assert pipeline.denoiser.dtype == torch.bfloat16
    assert torch.equal(pipeline.denoiser.embeddings, wanted.denoiser.embeddings)


def test_a_sampler_is_what_its_recipe_says(pipeline, learner):
    sampler = new_sampler(load(**FIELDS), pipeline, learner)
    guidance = sampler.guidance
    by_hand = GuidedSampler(
        pipeline,
        learner,
        guidance=guidance,
        steps=6,
        solver="dpmpp2m",
        cfg_scale=2.0,
        cfg_interval=(0.25, 0.75),
        seed=5,
        cache_interval=3,
        compile=False,
    )
    assert (guidance.omega, guidance.every, guidance.start, guidance.until) == (0.1, 2, 0.1, 0.9)
    assert (guidance.mode, guidance.criterion, sampler.table.needs_x0_prev) == (
        "score",
        "margin",
        True,
    )
    assert sampler.runner.region == "blocks"
    assert torch.equal(sampler.generate([0, 1]).images, by_hand.generate([0, 1]).images)
    assert new_sampler(load(eta=0.5), pipeline, None).table.needs_noise
    assert (
        new_sampler(
            load(generator={"compile": True}), pipeline, None, compile=False
        ).runner.tuner.mode
        is False
    )


def test_no_field_is_without_effect():
    """A new field needs a place in ``dpfast.generate.from_recipe``, or in the list of what others
    read.
    """
    described = inspect.getsource(recipes)
    elsewhere = {
        "batch_size",
        "micro_batch",
        "guide_with",  # of the loop around the sampler, and ``at_once``
        "omega_classes",
        "anchor_classes",  # of ``dpfast.sources.strengths``, which knows the labels
    }
    for section, name in ((load().generator, "generator"), (load().guidance, "guidance")):
        for field in dataclasses.fields(section):
            assert field.name in elsewhere or f"{name}.{field.name}" in described, field.name


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"solver": "heun"}, "solver = 'heun'"),
        ({"prompt_template": "a photo"}, "prompt_template = 'a photo'"),
        ({"class_names": "ship,,frog"}, "class_names ="),
        ({"solver": "dpmpp2m", "eta": "0.5"}, "eta = 0.5"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_loaded(overrides, named):
    with pytest.raises(InputError, match=named):
        load(**overrides)


def test_a_solver_that_the_pipeline_does_not_take_is_the_recipes_fault(stable_diffusion_3_folder):
    flow = Pipeline.from_pretrained(stable_diffusion_3_folder, class_names=["ship", "frog"])
    with pytest.raises(InputError, match="solver = 'ddim'"):
        new_sampler(load(solver="ddim"), flow, None)
