"""Strengths along a trajectory: what a step takes of omega, anchor and cfg_scale."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dpfast.adapters.cond_fn import make_cond_fn
from dpfast.adapters.gradient import LearnerGradient
from dpfast.errors import InputError
from dpfast.generate import preflight
from dpfast.generate.guidance import GuidanceConfig, factors
from dpfast.generate.sampler import GuidedSampler
from tests.generate.standin import StandInRecorder, force_reference

STEPS = 5
LABELS = [0, 2, 1]
OMEGAS, ANCHORS = torch.tensor([0.1, 0.3, 0.0]), torch.tensor([0.5, 0.0, 2.0])
PLAIN = GuidanceConfig(omega=0.1, every=2, anchor=0.5)
RISING, FALLING, CFG = ((0.0, 0.5), (1.0, 3.0)), ((0.2, 2.0), (0.6, 0.25)), ((0.5, 1.0), (0.9, 2.0))
SCHEDULED = replace(PLAIN, omega_schedule=RISING, anchor_schedule=FALLING)


def new_sampler(pipeline, learner, guidance=PLAIN, **options):
    known = {"steps": STEPS, "cfg_scale": 2.0, "compile": False, "guidance": guidance}
    return GuidedSampler(pipeline, learner, **known | options)


@pytest.fixture
def scheduled(pipeline, learner):
    return new_sampler(pipeline, learner, SCHEDULED, cfg_schedule=CFG)


def test_a_schedule_is_straight_between_its_points_and_level_beyond():
    assert factors(((0.2, 1.0), (0.6, 3.0)), 10) == pytest.approx(
        [1, 1, 1, 1.5, 2, 2.5, 3, 3, 3, 3]
    )
    assert factors(((0.5, 2.0),), 3) == [2.0, 2.0, 2.0]
    assert factors((), 3) == [1.0, 1.0, 1.0]


def by_hand(sampler, labels, ids, omega, anchor):
    """The latents of a sampler without schedules whose strengths are set before each step."""
    state = sampler.begin(labels, ids, omega=omega, anchor=anchor)
    for step in range(STEPS):
        of_omega, of_anchor, of_cfg = (
            factors(points, STEPS)[step] for points in (RISING, FALLING, CFG)
        )
        scale = torch.tensor(1 + of_cfg * (2.0 - 1))
        told = {"omega": omega * of_omega, "anchor": anchor * of_anchor, "cfg_scale": scale}
        state = sampler.advance(replace(state, **told), step + 1)
    return state.x


def test_a_scheduled_batch_is_a_loop_over_its_samples_and_steps(scheduled, pipeline, learner):
    begun = scheduled.begin(LABELS, omega=OMEGAS, anchor=ANCHORS)
    found, plain = scheduled.advance(begun).x, new_sampler(pipeline, learner)
    torch.testing.assert_close(found, by_hand(plain, LABELS, [0, 1, 2], OMEGAS, ANCHORS))
    for row, label in enumerate(LABELS):
        rows = slice(row, row + 1)
        alone = by_hand(plain, [label], [row], OMEGAS[rows], ANCHORS[rows])
        torch.testing.assert_close(found[rows], alone, rtol=1e-4, atol=1e-5)
    level = plain.advance(plain.begin(LABELS, omega=OMEGAS, anchor=ANCHORS)).x
    assert float((level - found).abs().amax()) > 0.01


def test_a_constant_schedule_has_the_bits_of_none(pipeline, learner):
    constant = replace(PLAIN, omega_schedule=((0.3, 1.0),), anchor_schedule=((0, 1), (1, 1)))
    expected = new_sampler(pipeline, learner).generate(LABELS)
    sampler = new_sampler(pipeline, learner, constant, cfg_schedule=((0.0, 1.0),))
    assert sampler.parts.factors is None  # the steps are those without an input more
    found = sampler.generate(LABELS)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.latents, expected.latents)
    doubled = replace(PLAIN, omega=0.05, omega_schedule=((0.0, 2.0),))
    found = new_sampler(pipeline, learner, doubled).generate(LABELS)
    assert torch.equal(found.latents, expected.latents)  # a power of two rounds nothing


def test_a_step_whose_factor_is_zero_is_unguided_or_without_cfg(pipeline, learner):
    late = replace(PLAIN, omega_schedule=((0.0, 0.0), (0.4, 0.0), (0.6, 1.0)))
    sampler = new_sampler(pipeline, learner, late, cfg_schedule=((0.2, 0.0), (0.3, 1.0)))
    kinds = [(each.guided, each.cfg) for each in sampler.variants(guided=True)]
    assert kinds == [(False, False), (False, False), (False, True), (False, True), (True, True)]


def test_one_capture_serves_all_steps_of_a_schedule(scheduled, pipeline, learner, monkeypatch):
    force_reference(monkeypatch)
    recorder = StandInRecorder()
    replayed = new_sampler(pipeline, learner, SCHEDULED, cfg_schedule=CFG, cuda_graphs=recorder)
    told = {"omega": OMEGAS, "anchor": ANCHORS}
    expected = scheduled.generate(LABELS, **told).images
    found = torch.cat([each.images for each in replayed.stream(LABELS, batch_size=2, **told)])
    assert int((found.int() - expected.int()).abs().max()) <= 1
    assert recorder.recorded == 3  # guided, plain, decoding
    assert not replayed.runner.fallbacks


@pytest.mark.long
def test_one_compilation_serves_all_steps_of_a_schedule(scheduled, pipeline, learner):
    compiled = new_sampler(pipeline, learner, SCHEDULED, cfg_schedule=CFG, compile=True)
    counter = CompileCounterWithBackend("eager")
    compiled.runner.backend = counter
    told = {"omega": OMEGAS, "anchor": ANCHORS}
    found = compiled.generate(LABELS, **told)
    torch.testing.assert_close(
        found.latents, scheduled.generate(LABELS, **told).latents, rtol=1e-2, atol=1e-2
    )
    assert counter.frame_count == 3


def test_a_sample_with_a_strength_of_its_own_does_not_depend_on_its_batch(pipeline, learner):
    sampler = new_sampler(pipeline, learner)
    still = torch.zeros(2)
    alone = sampler.begin([0, 1], omega=still, anchor=0.0)
    assert alone.variants == sampler.begin([0, 1], omega=0.1, anchor=0.0).variants
    beside = sampler.begin([0, 2], [0, 7], omega=torch.tensor([0.0, 0.3]), anchor=0.0)
    assert torch.equal(sampler.advance(alone).x[0], sampler.advance(beside).x[0])
    assert not any(each.guided for each in sampler.begin([0, 1], omega=0.0).variants)


@pytest.mark.parametrize("name", ["omega_schedule", "anchor_schedule", "cfg_schedule"])
@pytest.mark.parametrize(
    ("points", "said"),
    [
        (((0.5, 1.0), (0.5, 2.0)), "expected fractions of the steps that rise, from 0 to 1 at"),
        (((0.5, 1.0), (0.2, 2.0)), "expected fractions of the steps that rise"),
        (((-0.1, 1.0),), "expected fractions of the steps that rise"),
        (((0.0, 1.0), (1.5, 2.0)), "expected fractions of the steps that rise"),
        (((0.0, -1.0),), "_schedule = -1.0: expected at least 0"),
        (((0.0, float("nan")),), "_schedule = nan: expected a finite number"),
        (((float("inf"), 1.0),), "_schedule = inf: expected a finite number"),
        (((0.0, 1e39),), r"_schedule = 1e\+39: expected a finite number of float32"),
        ((0.5, 1.0), r"each of \w+ must be \(fraction of the steps, factor\), got 0.5"),
        (((0.5,),), r"each of \w+ must be \(fraction of the steps, factor\), got \(0.5,\)"),
        (((0.5, True),), "must be a number, got True"),
        ("linear", "must be pairs"),
        (None, "must be pairs"),
    ],
)
def test_a_wrong_schedule_is_named(name, points, said, pipeline):
    config = {"cfg_schedule": points} if name == "cfg_schedule" else {}
    with pytest.raises((InputError, TypeError), match=said) as raised:
        new_sampler(pipeline, None, PLAIN if config else GuidanceConfig(**{name: points}), **config)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_schedule_that_leaves_no_step_is_refused(pipeline, learner):
    none = replace(PLAIN, omega_schedule=((0.0, 0.0),))
    with pytest.raises(InputError, match=r"omega_schedule = .*its factor is 0 in all of the 5"):
        new_sampler(pipeline, learner, none)
    with pytest.raises(InputError, match=r"cfg_schedule = .*its factor is 0 in all steps"):
        new_sampler(pipeline, learner, cfg_schedule=((0.0, 0.0),))


def test_a_loop_of_ones_own_says_the_step(learner):
    x, score = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    gradient = torch.randn(2, 3, 8, 8)

    def moved(guidance, **step):
        return LearnerGradient(learner=learner, guidance=guidance).displaced(
            x, gradient, score, **step
        )

    at = SCHEDULED.at(3, STEPS)
    assert at == (0.1 * factors(RISING, STEPS)[3], 0.5 * 0.25)
    expected = moved(GuidanceConfig(omega=at[0], anchor=at[1]))
    assert torch.equal(moved(SCHEDULED, at=(3, STEPS)), expected)
    with pytest.raises(InputError, match=r"omega_schedule = .*: say the step"):
        moved(SCHEDULED)
    with pytest.raises(InputError, match=r"omega_schedule = .*a cond_fn knows no step index"):
        make_cond_fn(
            lambda x, t: x,
            learner,
            [0.9, 0.5],
            guidance=GuidanceConfig(mode="score", every=1, omega_schedule=RISING),
        )


@pytest.mark.parametrize(
    ("points", "steps", "begin", "idle"),
    [
        (((0.5, 0.0), (0.6, 1.0)), 5, 0, False),  # step 4 of 0, 2, 4 is guided and anchored
        (((0.8, 0.0), (0.9, 1.0)), 5, 0, True),
        (((0.4, 0.0), (0.5, 1.0)), 2, 0, True),  # step 1 is anchored, 0 alone is guided
        (((0.4, 1.0), (0.5, 0.0)), 5, 0, False),  # steps 0 and 2
        (((0.4, 1.0), (0.5, 0.0)), 5, 3, True),
        ((), 2, 0, False),
    ],
)
def test_an_anchor_that_acts_in_no_step_is_warned_of_once(
    points, steps, begin, idle, pipeline, learner, caplog
):
    preflight._warn_of_idle_anchor.cache_clear()
    sampler = new_sampler(pipeline, learner, replace(PLAIN, anchor_schedule=points), steps=steps)
    for _ in range(2):
        sampler.check_anchored(step=begin)
    told = [line for line in caplog.messages if "anchor has no effect" in line]
    assert len(told) == idle
    if idle:
        first, second = (f"{fraction:g}:{factor:g}" for fraction, factor in points)
        assert f"anchor_schedule = {first}, {second} is 0 in all guided steps" in told[0]


def test_an_anchor_of_steps_without_cfg_alone_is_warned_of(pipeline, learner, caplog):
    preflight._warn_of_idle_anchor.cache_clear()
    late = replace(PLAIN, anchor_schedule=((0.5, 0.0), (0.6, 1.0)))  # step 4 of 0, 2, 4
    new_sampler(pipeline, learner, late).generate([0])
    assert not caplog.messages
    new_sampler(pipeline, learner, late, cfg_interval=(0.0, 0.5)).generate([0])
    assert [line for line in caplog.messages if "anchor has no effect" in line]
