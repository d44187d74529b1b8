"""What a run writes, planned: bytes of samples and checkpoints, and how often these are due."""

import dataclasses

import pytest
import torch

from dpfast.config import Recipe
from dpfast.learn.parts import freeze
from dpfast.planning.disk import WRITTEN, plan_disk
from dpfast.planning.training import count_learner
from dpfast.pool.codecs import saved_bytes
from dpfast.pool.memory_tiers import MemoryTiers, readable
from dpfast.pool.placement import Placement
from dpfast.practice.disk import checkpoint_bytes


class Counted:
    def __init__(self, recipe):
        self.learner = count_learner(recipe.learner, 10, (1, 32, 32), half=False)
        self.image, self.latent = (1, 32, 32), (4, 8, 8)


@pytest.fixture(scope="module")
def recipe():
    return Recipe.load(
        "fashion", iterations=1000, evaluate_every=10, initial_samples=1000, round_samples=500
    )


def planned(recipe, seconds=20_000.0, training=10_000.0, **pool):
    pool = dataclasses.replace(recipe.pool, **pool)
    recipe = dataclasses.replace(recipe, pool=pool)
    places = Placement.of(3000, (1, 32, 32), tiers=MemoryTiers(host_bytes=1 << 30))
    return plan_disk(recipe, places, Counted(recipe), 3000, seconds, training)


def test_samples_and_checkpoints_add_up(recipe):
    disk = planned(recipe, save_samples="npy")
    assert disk.each == saved_bytes("pixels", (1, 32, 32), "npy")
    assert disk.samples == 3000 * disk.each
    assert disk.kept == 4  # two, the one before the cool-down, and the one that is being written
    assert disk.total == disk.samples + 4 * disk.checkpoint
    assert planned(recipe, save_samples="none").total == 0
    assert planned(recipe, save_samples="png").samples < disk.samples
    branches = dataclasses.replace(
        recipe, practice=dataclasses.replace(recipe.practice, keep_rounds=True)
    )
    assert planned(branches).kept == 4 + 4


def test_checkpoints_come_by_the_share_then_by_the_minutes(recipe):
    def written(**practice):
        changed = dataclasses.replace(
            recipe, practice=dataclasses.replace(recipe.practice, **practice)
        )
        # before and after the first samples and four rounds, and the end
        return planned(changed).checkpoints - 11

    assert written(checkpoint_minutes=0.0) == 100  # at every evaluation
    assert written(checkpoint_share=1e-6) == 16  # every ten minutes of 10,000 s
    took = planned(recipe).checkpoint / WRITTEN
    assert written(checkpoint_share=took / 250) == 40
    assert planned(recipe).share == pytest.approx(planned(recipe).checkpoints * took / 20_000)


def test_prune_holds_its_largest_round(recipe):
    practice = dataclasses.replace(recipe.practice, sources=("dp", "prune"))
    pruned = dataclasses.replace(recipe, practice=practice)
    disk, plain = planned(pruned), planned(recipe)
    assert (disk.held, plain.held) == (500 * (32 * 32 + 4), 0)
    assert disk.total == plain.total + disk.held
    assert disk.lines()[-1] == "  prune holds 502 KiB on the disk while a round is made"
    latents = planned(pruned, codec="latents")
    assert latents.held == disk.held + 500 * 2 * 4 * 8 * 8
    unsaved = planned(pruned, save_samples="none")
    assert unsaved.lines()[-1].startswith("  prune holds 502 KiB in the memory of all hosts")
    once = dataclasses.replace(practice, round_samples=10**6)
    assert planned(dataclasses.replace(pruned, practice=once)).held == 2000 * (32 * 32 + 4)


def test_a_pretrained_run_keeps_its_weights_once_and_no_moments_of_frozen_ones(recipe):
    """As many bytes as the model's own file of weights has."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    state = sum(value.numel() * value.itemsize for value in model.state_dict().values())
    moments = 2 * 4 * (4 * 9 + 4 + 4 + 4)
    assert checkpoint_bytes(model) == 2 * state + moments
    freeze(model, ("0",))
    assert checkpoint_bytes(model) == 2 * state + 2 * 4 * (4 + 4)

    learner = dataclasses.replace(recipe.learner, pretrained="folder")  # which nobody reads here
    places = Placement.of(3000, (1, 32, 32), tiers=MemoryTiers(host_bytes=1 << 30))
    ready = dataclasses.replace(recipe, learner=learner)
    disk = plan_disk(ready, places, Counted(recipe), 3000, 20_000.0, 10_000.0)
    counted = Counted(recipe).learner
    assert disk.initial == 4 * (counted.parameters + counted.buffers)
    assert disk.total == planned(recipe).total + disk.initial
    assert f", pretrained weights {readable(disk.initial)}" in disk.lines()[0]
    assert "pretrained" not in planned(recipe).lines()[0]
