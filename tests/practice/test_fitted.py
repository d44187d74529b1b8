"""A run's own fit: what it changes where memory is short, and that it changes nothing elsewhere."""

import dataclasses

import pytest
import torch

from dpfast.config import Recipe
from dpfast.planning.fitting import place_pool, stages_of
from dpfast.planning.memory import sampling_bytes
from dpfast.pool import memory_tiers as tiers
from dpfast.pool.memory_tiers import GIB, MemoryTiers
from dpfast.practice import fitted
from dpfast.practice.experiment import DeliberatePractice
from dpfast.sources.costs import Cost

SMALL = {
    "sources": "dp",
    "initial_samples": 60,
    "round_samples": 30,
    "maximum_samples": 90,
    "iterations": 10,
}


def test_a_run_with_little_memory_takes_smaller_batches_and_says_so(monkeypatch):
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
    monkeypatch.setattr(fitted, "device_memory", lambda device: memory)
    practice = DeliberatePractice(recipe)
    assert practice.fit.generator_micro_batch == 10  # four equal parts; three of 14 do not fit
    assert practice.recipe.generator.batch_size == 40
    assert set(practice.unguided.sampler.runner.fitting.values()) == {10}
    assert "samples are made 10 at once, not 40 (generator.micro_batch)" in "\n".join(
        practice.fit.lines()
    )
    made = practice.unguided.stream(0, 60, Cost(), cfg_scale=recipe.generator.cfg_scale)
    assert [len(batch) for batch in made] == [10] * 6


def test_a_cpu_with_enough_memory_is_not_asked(monkeypatch):
    monkeypatch.setattr(fitted, "fit", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(fitted, "device_memory", lambda device: 4e9)
    practice = DeliberatePractice(Recipe.load("fashion", device="cpu"))
    assert practice.fit is None
    assert practice.recipe.generator.micro_batch is None


def test_a_model_that_cannot_be_counted_is_left_to_run_out_of_memory(monkeypatch, caplog):
    monkeypatch.setattr(fitted, "device_memory", lambda device: 1.0)
    monkeypatch.setattr(
        fitted, "fit", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no count\nof this"))
    )
    practice = DeliberatePractice(
        Recipe.load(
            "fashion", device="cpu", generator={"batch_size": 40}, **SMALL, evaluate_every=5
        )
    )
    assert practice.fit is None
    assert "nothing is fitted: no count" in caplog.text


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
