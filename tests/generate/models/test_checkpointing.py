"""Recomputed blocks: the same gradient from less memory, for every kind of network, and chosen only
where it helps.
"""

import dataclasses

import pytest
import torch

from dpfast.generate import bounded
from dpfast.generate.bounded import BoundedPath
from dpfast.generate.guidance import GuidanceConfig, GuidancePath
from dpfast.generate.models.checkpointing import with_checkpointing
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware import live_bytes
from dpfast.planning.architectures import published
from tests.tiny_pipelines import NAMES

FOLDERS = {
    "pipeline_folder": None,
    "stable_diffusion_folder": NAMES,
    "stable_diffusion_3_folder": NAMES,
    "pixart_folder": NAMES,
    "sana_folder": NAMES,
    "flux_folder": NAMES,
}
LEVELS = (torch.tensor(0.8), torch.tensor(0.6))


@pytest.fixture(params=[*FOLDERS, "pixel_folder"])
def paths(request, learner):
    """The plain path and its recomputing twin."""
    size = {"height": 16, "width": 16} if request.param == "flux_folder" else {}
    pipeline = Pipeline.from_pretrained(
        request.getfixturevalue(request.param), class_names=FOLDERS.get(request.param), **size
    )
    plain = GuidancePath(
        denoiser=pipeline.denoiser,
        decoder=pipeline.guidance_decoder,
        learner=lambda i: i.mean((2, 3)),
    )
    return plain, BoundedPath.of(plain, denoiser=with_checkpointing(pipeline.denoiser), taped=True)


def gradient(path, count):
    torch.manual_seed(1)
    x, labels = (
        torch.randn(count, *path.denoiser.sample_shape),
        torch.zeros(count, dtype=torch.int64),
    )
    return path.gradient(x, torch.tensor(300), labels, *LEVELS)


def test_gradient_prediction_and_value_are_the_same(paths):
    plain, twin = paths
    plain, twin = (
        dataclasses.replace(p, criterion=lambda z, _: z.square().sum(1)) for p in (plain, twin)
    )
    for ours, theirs in zip(gradient(twin, 3), gradient(plain, 3), strict=True):
        assert bool(ours.abs().sum() > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_inference_mode_gives_the_same_gradient(paths):
    """Where a service runs models: autograd records nothing there unless it is told to."""
    outside = gradient(paths[1], 3)
    with torch.inference_mode():
        inside = gradient(paths[1], 3)
    for ours, theirs in zip(inside, outside, strict=True):
        assert torch.equal(ours, theirs)


def test_a_pipeline_loaded_in_inference_mode_can_be_differentiated(pipeline_folder, learner):
    with torch.inference_mode():
        pipeline = Pipeline.from_pretrained(pipeline_folder)
        path = GuidancePath(
            denoiser=with_checkpointing(pipeline.denoiser),
            decoder=pipeline.guidance_decoder,
            learner=learner,
        )
        assert bool(gradient(BoundedPath.of(path, taped=True), 2)[0].abs().sum() > 0)


def test_it_holds_less(paths):
    plain, twin = (live_bytes.peak_bytes(lambda path=path: gradient(path, 8)) for path in paths)
    assert twin < 0.95 * plain  # of these tiny models; the deeper, the less


def test_a_budget_recomputes_only_where_chunks_would_be_small(pipeline, learner):
    path = GuidancePath(
        denoiser=pipeline.denoiser, decoder=pipeline.guidance_decoder, learner=learner
    )
    table = pipeline.table(4)
    _, one = bounded._chunk(path, table, 1)
    _, least = bounded._chunk(
        BoundedPath.of(path, denoiser=with_checkpointing(path.denoiser), taped=True), table, 1
    )
    assert least < one
    roomy, tight, tighter = (
        bounded.within_budget(path, table, budget, recompute=True)
        for budget in (20 * one, 3 * one, least)
    )
    assert roomy.denoiser is path.denoiser
    assert roomy.chunk >= bounded.enough(path.denoiser)
    assert tight.denoiser is not path.denoiser
    assert tight.chunk >= 3
    assert tighter.chunk == 1  # less than a sample holds without
    with pytest.raises(ValueError, match="memory_budget = "):
        bounded.within_budget(path, table, least // 2, recompute=True)


def test_a_model_without_known_blocks_is_refused():
    with pytest.raises(ValueError, match="without any of transformer_blocks"):
        with_checkpointing(torch.nn.Identity())


@pytest.mark.parametrize(
    ("name", "pixels", "samples"),
    [
        ("stable-diffusion-1.5", 512, 2),  # 4,096 latent pixels
        ("stable-diffusion-1.5", 256, 8),
        ("dit-xl-2", 256, 8),  # 256 tokens
        ("dit-xl-2", 512, 8),
        ("dit-xl-2", 2048, 1),
    ],
)
def test_what_is_enough_for_a_device_is_counted_in_tokens(name, pixels, samples):
    assert bounded.enough(published(name, pixels, dtype=torch.bfloat16).denoiser) == samples


def test_small_denoisers_are_given_enough_samples(paths):
    assert bounded.enough(paths[0].denoiser) == bounded.enough(paths[1].denoiser) == 8


def test_a_sampler_recomputes_in_eager_steps_alone(pipeline, learner):
    guidance = GuidanceConfig(omega=0.1, every=1)
    options = {"steps": 2, "guidance": guidance, "cfg_scale": 1.0}
    free = GuidedSampler(pipeline, learner, compile=False, **options)
    budget = 2 * bounded._chunk(free.runner.parts.path, free.table, 1)[1]
    eager, compiled = (
        GuidedSampler(pipeline, learner, compile=c, memory_budget=budget, **options)
        for c in (False, True)
    )
    assert eager.runner.parts.path.denoiser is not pipeline.denoiser
    assert compiled.runner.parts.path.denoiser is pipeline.denoiser
    difference = eager.generate([0, 1, 2]).images.int() - free.generate([0, 1, 2]).images.int()
    assert int(difference.abs().max()) <= 1


def test_compiled_blocks_recompute_within_the_budget_and_whole_steps_say_how(pipeline, learner):
    """A budget below what one sample holds: only recomputed blocks fit, eager or compiled one by
    one.
    """
    options = {"steps": 2, "guidance": GuidanceConfig(omega=0.1, every=1), "cfg_scale": 1.0}
    free = GuidedSampler(pipeline, learner, compile=False, **options)
    path, table = free.runner.parts.path, free.table
    _, one = bounded._chunk(path, table, 1)
    _, least = bounded._chunk(
        BoundedPath.of(path, denoiser=with_checkpointing(path.denoiser), taped=True), table, 1
    )
    options["memory_budget"] = (one + least) // 2
    with pytest.raises(
        ValueError, match="with compile = False or compile_region = 'blocks' it may hold less"
    ):
        GuidedSampler(pipeline, learner, compile=True, **options).generate([0])
    blocks = GuidedSampler(pipeline, learner, compile=True, compile_region="blocks", **options)
    blocks.runner.backend = "eager"
    difference = blocks.generate([0, 1, 2]).images.int() - free.generate([0, 1, 2]).images.int()
    assert int(difference.abs().max()) <= 1
