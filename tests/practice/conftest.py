"""A recipe of seconds for whole runs."""

import pytest
import torch

from dpfast.config import Recipe
from dpfast.data.real import RealData, RealSet
from dpfast.practice import experiment
from dpfast.sources import yardstick


@pytest.fixture
def recipe(pipeline_folder, monkeypatch):
    """A recipe of seconds: three classes, 16x16 images, noise as the real images, a yardstick of 20
    samples.
    """
    monkeypatch.setattr(yardstick, "SAMPLES", 20)

    def load_real(name, **_):
        generator = torch.Generator().manual_seed(0)
        sets = [
            RealSet(
                torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8, generator=generator),
                torch.arange(30) % 3,
            )
            for _ in range(2)
        ]
        return RealData(("cat", "dog", "red bicycle"), *sets)

    monkeypatch.setattr(experiment, "load_real", load_real)
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
                # a checkpoint at every evaluation, whatever the clock says
                "checkpoint_minutes": 0,
            },
        }
    )
