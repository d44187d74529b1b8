"""A recipe fitted to devices: what changes, in which order, and what is said."""

import dataclasses

import pytest

from dpfast.config import Recipe
from dpfast.hardware.peaks import DEVICES
from dpfast.planning.fitting import equal_part, fit, stages_of
from dpfast.planning.memory import sampling_bytes, training_bytes, usable
from dpfast.pool.memory_tiers import GIB

H100 = DEVICES["h100"]


@pytest.fixture(scope="module")
def recipe():
    return Recipe.load("fashion", generator={"batch_size": 32}, learner={"batch_size": 64})


@pytest.fixture(scope="module")
def stages(recipe):
    return stages_of(recipe, H100)


def small(memory):
    return dataclasses.replace(H100, memory=memory)


def test_a_recipe_that_fits_is_left_as_it_is(recipe, stages):
    fitted = fit(recipe, H100, count=2, stages=stages)
    assert fitted.fits
    assert (fitted.recipe, fitted.learner_micro_batch, fitted.generator_micro_batch) == (
        recipe,
        32,
        32,
    )
    assert fitted.changes == fitted.proposals == ()
    assert fitted.margin == usable(H100) - max(phase.total for phase in fitted.phases)
    assert "margin" in fitted.lines()[0]


def test_phases_add_what_lives_at_the_same_time(recipe, stages):
    fitted = fit(recipe, H100, stages=stages)
    phases = {phase.phase: phase for phase in fitted.phases}
    assert phases.keys() == {"unguided samples", "guided samples", "training", "evaluation"}
    pool = fitted.pool.in_tier["device"] * fitted.pool.bytes_per_sample
    always = pool + stages.weights + stages.learner.state
    samples = always + sampling_bytes(stages, H100, 32, guided=True)
    assert phases["guided samples"].total == pytest.approx(samples)
    step = always + training_bytes(stages, H100, share=64, micro_batch=64, ranks=1)
    assert phases["training"].total == pytest.approx(step)
    assert "guided samples" not in {
        phase.phase
        for phase in fit(
            recipe, H100, samples=recipe.practice.initial_samples, stages=stages
        ).phases
    }


def test_batches_are_parted_before_the_pool_gives_way_and_nothing_exceeds_the_device(
    recipe, stages
):
    always = stages.weights + stages.learner.state + stages.learner.gradients
    pooled = dataclasses.replace(recipe, pool=dataclasses.replace(recipe.pool, device_gib=1.0))
    seen = set()
    for beside in (0.3e9, 0.1e9, 0.03e9, 0.01e9):
        device = small((always + beside) / 0.9)
        fitted = fit(pooled, device, stages=stages)
        assert fitted.fits
        assert 64 % fitted.learner_micro_batch == 0
        assert (
            fitted.pool.in_tier["device"] * fitted.pool.bytes_per_sample
            <= fitted.recipe.pool.device_gib * GIB
        )
        seen.add((fitted.generator_micro_batch, fitted.learner_micro_batch))
        said = "\n".join(fitted.lines())
        assert ("at once" in said) == (fitted.generator_micro_batch < 32)
        assert ("micro-batches of" in said) == (fitted.learner_micro_batch < 64)
    assert len(seen) > 2
    assert fitted.generator_micro_batch < 32
    assert fitted.learner_micro_batch < 64


def test_a_device_that_holds_no_sample_is_said_not_to_fit(recipe, stages):
    fitted = fit(recipe, small(1e6), stages=stages)
    assert not fitted.fits
    assert fitted.margin < 0
    assert "missing" in fitted.lines()[0]


def test_a_pool_without_room_gets_a_size_that_has_one(recipe, stages):
    full = dataclasses.replace(
        recipe, pool=dataclasses.replace(recipe.pool, device_gib=0.0, host_gib=1.0)
    )
    fitted = fit(full, H100, samples=10**7, stages=stages)
    assert not fitted.fits
    most = int(next(line for line in fitted.proposals if "maximum" in line).split()[1].rstrip(","))
    assert fit(full, H100, samples=most, stages=stages).pool.fits
    assert not fit(full, H100, samples=4 * most, stages=stages).pool.fits


@pytest.mark.parametrize(
    ("whole", "most", "even", "size"), [(32, 7, False, 7), (32, 7, True, 4), (8, 9, False, 8)]
)
def test_parts_are_equal_and_as_few_as_fit(whole, most, even, size):
    assert equal_part(whole, lambda part: part <= most, even=even) == size


def test_the_cpu_of_a_run_keeps_its_batches(recipe):
    cpu = dataclasses.replace(H100, half=1e12, full=1e12, memory=8e9, host=None, disk=None)
    fitted = fit(recipe, cpu)
    assert fitted.changes == ()
    assert fitted.recipe == recipe
    assert fitted.fits
