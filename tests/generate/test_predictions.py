"""The clean images that the steps of a trajectory predict; asking for them changes no sample."""

import pytest
import torch

from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.sampler import GuidedSampler
from dpfast.ops import normal
from tests.generate.standin import StandInRecorder, Watch, force_reference

EVERY_SECOND = GuidanceConfig(omega=0.1, every=2)


def sampler_of(pipeline, learner, **options):
    return GuidedSampler(
        pipeline, learner, **{"steps": 4, "guidance": EVERY_SECOND, "compile": False} | options
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eta": 0.5, "cfg_interval": (0.25, 0.75)},
        {"solver": "dpmpp2m"},
        {"steps": 6, "cache_interval": 2, "guidance": GuidanceConfig(omega=0.1, every=3)},
    ],
    ids=["ddim", "noise", "multistep", "features"],
)
@pytest.mark.parametrize("omega", [0.0, 0.1], ids=["unguided", "guided"])
def test_a_batch_for_each_step_and_then_the_samples_to_the_bit(options, omega, pipeline, learner):
    sampler = sampler_of(pipeline, learner, **options)
    expected = sampler.generate([0, 1, 2], [5, 2**40, 7], omega=omega, learner_step=9)
    *steps, last = sampler.predictions([0, 1, 2], [5, 2**40, 7], omega=omega, learner_step=9)
    assert len(steps) == len(sampler.table)
    for name in ("images", "labels", "sample_ids", "entropy", "latents"):
        assert torch.equal(getattr(last, name), getattr(expected, name)), name
    assert (last.learner_step, last.skipped) == (9, expected.skipped)
    shapes = {(batch.images.shape, batch.images.dtype, batch.learner_step) for batch in steps}
    assert shapes == {(expected.images.shape, torch.uint8, 9)}
    assert all(torch.equal(batch.sample_ids, expected.sample_ids) for batch in steps)
    distances = [float((b.images.float() - last.images.float()).abs().mean()) for b in steps]
    assert distances[0] > distances[-1]  # they come closer to the sample


def test_a_prediction_is_the_x0_of_its_step(pipeline):
    """x0 = (x - sigma eps) / alpha of the first step, without classifier-free guidance."""
    sampler = sampler_of(pipeline, None, cfg_scale=1.0)
    first = next(sampler.predictions([0, 2], [3, 4]))
    x = normal(torch.tensor([3, 4]), pipeline.denoiser.sample_shape, seed=0, stream=0)
    x = x * sampler.table.initial_scale
    alpha, sigma = sampler.table.rows[0, :2]
    with torch.no_grad():
        eps = pipeline.denoiser(x, sampler.table.timesteps[0], torch.tensor([0, 2]))
    expected = ((x - sigma * eps) / alpha).half()
    torch.testing.assert_close(first.latents, expected, rtol=2e-3, atol=2e-3)


def test_a_trajectory_keeps_no_x0_unasked_and_reads_no_host_when_asked(
    pipeline, learner, monkeypatch
):
    force_reference(monkeypatch)
    sampler = sampler_of(pipeline, learner)
    plain = sampler.begin([0, 1])
    assert not any(variant.x0 for variant in plain.variants)
    assert sampler.runner.step(plain).x0 is None
    assert sampler.advance(plain).x0_prev is None
    start = sampler.begin([0, 1], keep_x0=True)
    with torch.no_grad(), Watch() as watch:
        end = sampler.advance(start)
    assert not watch.reads
    assert end.x0_prev.shape == end.x.shape
    assert torch.equal(end.x, sampler.advance(plain).x)


def test_captured_steps_predict_the_same(pipeline, learner, monkeypatch):
    force_reference(monkeypatch)
    eager = list(sampler_of(pipeline, learner).predictions([0, 1]))
    recorder = StandInRecorder()
    sampler = sampler_of(pipeline, learner, cuda_graphs=recorder)
    sampler.generate([2, 1, 0])  # steps of a larger batch, which are captured
    captured = list(sampler.predictions([0, 1]))
    for one, other in zip(eager, captured, strict=True):
        assert int((one.images.int() - other.images.int()).abs().max()) <= 1
        torch.testing.assert_close(one.entropy, other.entropy, rtol=1e-3, atol=1e-4)
    assert not sampler.runner.fallbacks


def test_bad_input_raises_at_the_call(pipeline, learner):
    sampler = sampler_of(pipeline, learner)
    with pytest.raises(InputError, match="labels"):
        sampler.predictions([99])
    with pytest.raises(InputError, match="omega"):
        sampler_of(pipeline, None).predictions([0], omega=0.1)
    with pytest.raises(TypeError, match="learner_step"):
        sampler.predictions([0], learner_step=0.5)
