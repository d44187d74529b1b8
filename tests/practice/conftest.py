"""A recipe of seconds for whole runs."""

import pytest
from PIL import Image

from dpfast.config import Recipe
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.run_writer import RunWriter
from tests.practice.small import CLASSES, REAL, noise


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    """A folder of those images, for a command line, which takes no objects."""
    folder = tmp_path_factory.mktemp("real")
    for number, (image, label) in enumerate(zip(*noise(60), strict=True)):
        place = folder / CLASSES[label]
        place.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place / f"{number:03d}.png")
    return folder


@pytest.fixture
def recipe(pipeline_folder):
    """A recipe of seconds: three classes, 16x16 images, a yardstick of 20 samples; its real images
    are ``tests.practice.small.REAL``.
    """
    return recipe_of_seconds(pipeline_folder)


@pytest.fixture(scope="session")
def kept_run(pipeline_folder, tmp_path_factory):
    """The folder of a finished run of "dp" with three additions, whose rounds are kept; not to be
    changed.
    """
    path = tmp_path_factory.mktemp("kept") / "run"
    recipe = recipe_of_seconds(pipeline_folder, sources=["dp"], keep_rounds=True)
    with RunWriter(path, recipe) as folder:
        DeliberatePractice(recipe, real=REAL).run(folder, progress=False)
    return path


def recipe_of_seconds(pipeline_folder, **practice):
    return Recipe.from_dict(
        {
            "name": "test",
            "generator": {"pipeline": str(pipeline_folder), "steps": 3, "batch_size": 20},
            "guidance": {"omega": 0.2, "every": 1},
            "learner": {
                "model": "transformers:RegNetForImageClassification",
                "options": {
                    "embedding_size": 8,
                    "hidden_sizes": [8],
                    "depths": [1],
                    "groups_width": 8,
                },
                "batch_size": 8,
            },
            "practice": {
                "initial_samples": 30,
                "round_samples": 15,
                "maximum_samples": 70,
                "iterations": 100,
                "evaluate_every": 5,
                "patience": 1,
                "patience_growth": "fixed",
                "yardstick_samples": 20,
                # a checkpoint at every evaluation, whatever the clock says
                "checkpoint_minutes": 0,
                **practice,
            },
        }
    )
