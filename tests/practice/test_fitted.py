"""A run's own fit: what it changes where memory is short, and that it changes nothing elsewhere."""

import dataclasses

import pytest
import torch

from dpfast.config import Recipe
from dpfast.parallel import ALONE
from dpfast.planning.fitting import place_pool, stages_of
from dpfast.planning.memory import sampling_bytes
from dpfast.pool import memory_tiers as tiers
from dpfast.pool.memory_tiers import GIB, MemoryTiers
from dpfast.practice import fitted
from dpfast.practice.fitted import fit_run
from dpfast.sources.costs import Cost
from dpfast.sources.unguided import UnguidedSamples

SMALL = {
    "sources": "dp",
    "initial_samples": 60,
    "round_samples": 30,
    "maximum_samples": 90,
    "iterations": 10,
}


def uncounted(classes, channels):
    """A learner whose forward pass says in two lines that it takes numbers alone."""

    class Uncounted(torch.nn.Module):
        def forward(self, images):
            raise RuntimeError("no count\nof this")

    return Uncounted()


def test_a_run_with_little_memory_takes_smaller_batches_and_says_so(fashion):
    recipe = Recipe.load(
        "fashion",
        device="cpu",
        generator={"batch_size": 40},
        learner={"batch_size": 32},
        evaluate_every=5,
        **SMALL,
    )
    cpu = dataclasses.replace(fitted._CPU, memory=1e9, host=1e9)
    stages = stages_of(recipe, cpu)
    pool = place_pool(recipe, 90, stages, cpu, 1)
    held = stages.weights + stages.learner.state + pool.samples * pool.bytes_per_sample
    memory = held + sampling_bytes(stages, cpu, 12, guided=True)
    fit = fit_run(recipe, fashion, ALONE, memory=memory)
    assert fit.generator_micro_batch == 10  # four equal parts; three of 14 do not fit
    assert fit.recipe.generator.batch_size == 40
    said = "\n".join(fit.lines())
    assert "samples are made 10 at once, not 40 (generator.micro_batch)" in said
    unguided = UnguidedSamples(fit.recipe, fashion)
    assert set(unguided.sampler.runner.fitting.values()) == {10}
    made = unguided.stream(0, 60, Cost(), cfg_scale=recipe.generator.cfg_scale)
    assert [len(batch) for batch in made] == [10] * 6


def test_a_cpu_with_enough_memory_is_not_asked(fashion):
    assert fit_run(Recipe.load("fashion", device="cpu"), fashion, ALONE, memory=4e9) is None


def test_a_model_that_cannot_be_counted_is_left_to_run_out_of_memory(fashion, caplog):
    learner = {"model": f"{__name__}:uncounted", "options": {}}
    recipe = Recipe.load("fashion", device="cpu", learner=learner, **SMALL, evaluate_every=5)
    assert fit_run(recipe, fashion, ALONE, memory=1.0) is None
    assert "nothing is fitted: no count" in caplog.text
    assert "of this" not in caplog.text


def test_objects_that_cannot_be_counted_are_named(fashion, caplog):
    recipe = Recipe.load("fashion", device="cpu")
    assert fit_run(recipe, fashion, ALONE, learner=torch.nn.Identity(), memory=1.0) is None
    assert "memory of the learner is not known, an object of the caller's" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "device", "host"), [({}, 0, 7), ({"device_gib": 2}, 2, 5), ({"host_gib": 1}, 0, 1)]
)
def test_a_cpu_s_memory_is_counted_once_and_by_the_fit_as_by_the_run(
    sizes, device, host, monkeypatch
):
    monkeypatch.setattr(tiers, "free_bytes", lambda: 10 * GIB)
    recipe = Recipe.load("fashion", device="cpu", **sizes)
    found = MemoryTiers.from_recipe(recipe.pool, torch.device("cpu"), None)
    assert (found.device_bytes, found.host_bytes) == (device * GIB, host * GIB)
    cpu = dataclasses.replace(fitted._CPU, memory=10.0 * GIB, host=10.0 * GIB)
    assert place_pool(recipe, 90, stages_of(recipe, cpu), cpu, 1).tiers == found
