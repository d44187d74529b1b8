"""Two rounds of the loop on a generator of every family, on one rank and on two; all by
``pytest -m long`` on this file.
"""

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

import dpfast
from dpfast.pool.reader import open_pool
from tests import tiny_pipelines
from tests.practice.launch import Launched
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


FIELDS = {
    "class-names": ",".join(NAMES),
    "image-size": 16,
    "model": "tests.tiny_pipelines:learner",
    "solver": "auto",
    "steps": 3,
    "cfg-scale": 2,
    "anchor": 0,
    "initial-samples": 12,
    "round-samples": 6,
    "maximum-samples": 24,
    "iterations": 30,
    "evaluate-every": 5,
    "evaluate-unit": "steps",
    "patience": 1,
    "patience-growth": "fixed",
    "yardstick-samples": 6,
    "generator.batch-size": 6,
    "learner.batch-size": 8,
    "checkpoint-minutes": 0,
}
MADE = {  # beside the fixtures
    "dit of a flow": lambda folder: dit_of_a_flow(folder),
    "class-conditional pixels": lambda folder: tiny_pipelines.pixel(folder, class_embeddings=4),
    "flux schnell": lambda folder: tiny_pipelines.flux(folder, guidance_embeds=False),
}
EVERY_FAMILY = ("pipeline_folder", "pixart_folder", *OTHERS, *MADE)


def dit_of_a_flow(folder):
    tiny_pipelines.dit(folder)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    generator = torch.Generator().manual_seed(1)
    for name in NAMES:
        (root / name).mkdir()
        for number in range(8):
            pixels = torch.randint(0, 256, (16, 16), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / name / f"{number}.png")
    return root


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("folder", EVERY_FAMILY)
def test_a_run_asks_for_the_same_samples_on_one_rank_and_on_two(
    folder, request, validation, tmp_path
):
    if folder in MADE:
        source = MADE[folder](tmp_path / "generator")
    else:
        source = request.getfixturevalue(folder)
    fields = FIELDS | {"pipeline": source, "validation": validation}
    if "flux" in folder or "sana" in folder:
        fields |= {"height": 16, "width": 16}
    options = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    asked = []
    for ranks in (1, 2):
        run = Launched("fashion", tmp_path / f"on-{ranks}", options, ranks=ranks)
        run.ended()
        records = open_pool(run.out / "pool_dp").records()
        asked.append(sorted(records[["sample_id", "label", "round"]].tolist()))
    assert [each[2] for each in asked[0]] == [0] * 12 + [1] * 6 + [2] * 6
    assert asked[0] == asked[1]
