"""Two rounds of the loop on a generator of every family; all by ``pytest -m long`` on this file."""

import pytest
import torch
from torch import nn

import dpfast
from tests.tiny_pipelines import NAMES

SIZES = {"flux_folder": {"height": 16, "width": 16}, "sana_folder": {"height": 16, "width": 16}}
OTHERS = (
    "stable_diffusion_folder",
    "stable_diffusion_xl_folder",
    "stable_diffusion_3_folder",
    *SIZES,
)
LATER = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in OTHERS]


@pytest.mark.parametrize("folder", ["pixart_folder", *LATER])
def test_a_learner_is_trained_on_what_a_family_makes(folder, request, tmp_path):
    source = request.getfixturevalue(folder)
    pipeline = dpfast.Pipeline.from_pretrained(source, class_names=NAMES, **SIZES.get(folder, {}))
    recipe = dpfast.Recipe.load(
        "fashion",
        solver="auto",
        steps=3,
        cfg_scale=2.0,
        anchor=0.0,
        initial_samples=12,
        round_samples=6,
        maximum_samples=24,
        iterations=30,
        evaluate_every=5,
        evaluate_unit="steps",
        patience=1,
        patience_growth="fixed",
        yardstick_samples=6,
        generator={"compile": False},
        learner={"batch_size": 8, "compile": False},
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 16, 16), generator=generator, dtype=torch.uint8)
    learner = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    practice = dpfast.DeliberatePractice(
        recipe, pipeline=pipeline, learner=learner, real=(images, torch.arange(24) % 3)
    )
    results = practice.run(tmp_path / "run", progress=False)
    assert [len(result.pool) for result in results] == [24, 24]
