"""The sampler on a GPU: captured steps, no host waits, and the images of a CPU."""

import logging

import pytest
import torch

from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from tests.tiny_pipelines import NAMES

GUIDANCE = GuidanceConfig(omega=0.1, every=2)
FAMILIES = {
    "dit": ("pipeline_folder", {}),
    "stable diffusion": ("stable_diffusion_folder", {"class_names": NAMES}),
    "stable diffusion 3": ("stable_diffusion_3_folder", {"class_names": NAMES}),
    "pixels": ("pixel_folder", {"class_names": NAMES}),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """A folder, and the options that it is loaded with."""
    name, options = FAMILIES[request.param]
    return request.getfixturevalue(name), options


def learner_of(pipeline):
    """A small classifier of any image size."""
    torch.manual_seed(1)
    channels = pipeline.image_channels
    layers = [
        torch.nn.Conv2d(channels, 8, 3, stride=2),
        torch.nn.SiLU(),
        torch.nn.AdaptiveAvgPool2d(3),
    ]
    return (
        torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(72, 3))
        .eval()
        .requires_grad_(False)
    )


def captures(sampler):
    return {function.name: function.captures for function in sampler.runner._functions.values()}


def close(a, b):
    """Whether two batches show the same images, up to the rounding of another order of sums."""
    return int((a.images.cpu().int() - b.images.cpu().int()).abs().max()) <= 2


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_every_family_is_captured_and_makes_the_images_of_a_cpu(family, eta, on_gpu):
    folder, options = family
    if eta and "3" in folder.name:
        pytest.skip("flow matching has no eta")
    host, device = Pipeline.from_pretrained(folder, **options), on_gpu(folder, **options)
    settings = {"guidance": GUIDANCE, "steps": 4, "eta": eta, "compile": False}
    expected = GuidedSampler(host, learner_of(host), **settings).generate([0, 1, 2])
    sampler = GuidedSampler(device, learner_of(device).cuda(), **settings)
    first, again = (sampler.generate([0, 1, 2]) for _ in range(2))
    assert sampler.runner.fallbacks == {}
    assert all(count == 1 for count in captures(sampler).values())
    assert first.images.is_cuda
    assert torch.equal(first.images, again.images)
    assert close(first, expected)
    torch.testing.assert_close(first.entropy.cpu(), expected.entropy, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["dit", "stable diffusion", "stable diffusion 3"])
def test_anchors_of_any_value_share_a_capture_and_make_the_images_of_a_cpu(name, request, on_gpu):
    fixture, options = FAMILIES[name]
    folder = request.getfixturevalue(fixture)
    host, device = Pipeline.from_pretrained(folder, **options), on_gpu(folder, **options)
    anchored = GuidanceConfig(omega=0.1, every=2, anchor=0.5)
    settings = {"guidance": anchored, "steps": 4, "compile": False}
    expected = GuidedSampler(host, learner_of(host), **settings)
    sampler = GuidedSampler(device, learner_of(device).cuda(), **settings)
    for anchor in (None, 2.0, torch.tensor([0.0, 0.5, 1.0])):
        assert close(
            sampler.generate([0, 1, 2], anchor=anchor), expected.generate([0, 1, 2], anchor=anchor)
        )
    assert sampler.runner.fallbacks == {}
    assert set(captures(sampler).values()) == {1}


def test_a_captured_batch_is_the_eager_one(on_gpu, pipeline_folder, gpu_learner):
    pipeline = on_gpu(pipeline_folder)
    settings = {"guidance": GUIDANCE, "steps": 6, "solver": "dpmpp2m", "compile": False}
    eager = GuidedSampler(pipeline, gpu_learner, cuda_graphs=False, **settings).generate(
        [0, 1, 2, 0]
    )
    captured = GuidedSampler(pipeline, gpu_learner, **settings)
    for _ in range(2):
        batch = captured.generate([0, 1, 2, 0])
        assert close(batch, eager)
        torch.testing.assert_close(
            batch.latents.float(), eager.latents.float(), rtol=2e-3, atol=2e-3
        )
    assert captured.runner.fallbacks == {}


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_steps_never_wait_for_the_device(cuda_graphs, on_gpu, pipeline_folder, gpu_learner):
    sampler = GuidedSampler(
        on_gpu(pipeline_folder),
        gpu_learner,
        guidance=GUIDANCE,
        steps=6,
        compile=False,
        cuda_graphs=cuda_graphs,
    )
    sampler.generate([0, 1, 2])  # the first batch captures
    trajectory = sampler.begin([0, 1, 2], [5, 6, 7])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = sampler.advance(trajectory)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.step == 6


def test_an_update_of_the_learner_shows_without_another_capture(
    on_gpu, pipeline_folder, gpu_learner
):
    sampler = GuidedSampler(
        on_gpu(pipeline_folder),
        gpu_learner,
        guidance=GuidanceConfig(omega=0.3, every=1),
        steps=4,
        compile=False,
    )
    before = sampler.generate([0, 1, 2])
    with torch.no_grad():
        for parameter in gpu_learner.parameters():
            parameter.neg_()
    after = sampler.generate([0, 1, 2])
    assert not torch.equal(before.images, after.images)
    assert set(captures(sampler).values()) == {1}
    eager = GuidedSampler(
        sampler.pipeline,
        gpu_learner,
        guidance=sampler.guidance,
        steps=4,
        compile=False,
        cuda_graphs=False,
    )
    assert close(after, eager.generate([0, 1, 2]))


def test_weights_that_moved_are_captured_anew(on_gpu, pipeline_folder, gpu_learner, caplog):
    sampler = GuidedSampler(
        on_gpu(pipeline_folder), gpu_learner, guidance=GUIDANCE, steps=4, compile=False
    )
    sampler.generate([0, 1, 2])
    with torch.no_grad():
        for parameter in gpu_learner.parameters():
            parameter.data = -parameter.data.clone()
    with caplog.at_level(logging.INFO):
        moved = sampler.generate([0, 1, 2])
    assert "weights of the" in caplog.text
    eager = GuidedSampler(
        sampler.pipeline, gpu_learner, guidance=GUIDANCE, steps=4, compile=False, cuda_graphs=False
    )
    assert close(moved, eager.generate([0, 1, 2]))


def test_a_partial_batch_replays_the_whole_one(on_gpu, pipeline_folder, gpu_learner):
    sampler = GuidedSampler(
        on_gpu(pipeline_folder), gpu_learner, guidance=GUIDANCE, steps=4, compile=False
    )
    labels, ids = torch.arange(20) % 3, torch.arange(20)
    whole = sampler.generate(labels, ids)
    parts = list(sampler.stream(labels, batch_size=8))
    assert [len(part) for part in parts] == [8, 8, 4]
    images = torch.cat([part.images for part in parts])
    assert int((images.int() - whole.images.int()).abs().max()) <= 1


def test_a_released_sampler_holds_no_memory_of_its_captures(on_gpu, pipeline_folder, gpu_learner):
    sampler = GuidedSampler(
        on_gpu(pipeline_folder), gpu_learner, guidance=GUIDANCE, steps=4, compile=False
    )
    labels, held, left = torch.arange(64) % 3, [], []
    for _ in range(3):
        sampler.generate(labels)
        held.append(torch.cuda.memory_reserved())
        sampler.release()
        left.append(torch.cuda.memory_reserved())
    assert left[1] == left[2] < held[1]  # the first batch leaves the libraries' workspaces


def test_a_compiled_step_is_captured(on_gpu, pipeline_folder, gpu_learner):
    pipeline = on_gpu(pipeline_folder)
    settings = {"guidance": GUIDANCE, "steps": 4}
    eager = GuidedSampler(
        pipeline, gpu_learner, compile=False, cuda_graphs=False, **settings
    ).generate([0, 1, 2])
    sampler = GuidedSampler(pipeline, gpu_learner, compile=True, **settings)
    for _ in range(2):
        assert close(sampler.generate([0, 1, 2]), eager)
    assert sampler.runner.fallbacks == {}
    assert set(captures(sampler).values()) == {1}


def test_compiled_blocks_are_captured(on_gpu, pipeline_folder, gpu_learner):
    pipeline = on_gpu(pipeline_folder)
    settings = {"guidance": GUIDANCE, "steps": 4}
    eager = GuidedSampler(
        pipeline, gpu_learner, compile=False, cuda_graphs=False, **settings
    ).generate([0, 1, 2])
    sampler = GuidedSampler(
        pipeline, gpu_learner, compile=True, compile_region="blocks", **settings
    )
    assert close(sampler.generate([0, 1, 2]), eager)
    assert sampler.runner.fallbacks == {}


def test_features_are_reused_between_captures(on_gpu, pipeline_folder, gpu_learner):
    pipeline = on_gpu(pipeline_folder)
    settings = {
        "guidance": GuidanceConfig(omega=0.1, every=4),
        "steps": 8,
        "cache_interval": 2,
        "compile": False,
    }
    eager = GuidedSampler(pipeline, gpu_learner, cuda_graphs=False, **settings).generate([0, 1, 2])
    sampler = GuidedSampler(pipeline, gpu_learner, **settings)
    for _ in range(2):
        assert close(sampler.generate([0, 1, 2]), eager)
    assert sampler.runner.fallbacks == {}


def test_a_budget_bounds_the_memory_of_a_guided_step(on_gpu, pipeline_folder, gpu_learner):
    pipeline, labels = on_gpu(pipeline_folder), torch.arange(256) % 3

    def peak(**options):
        sampler = GuidedSampler(
            pipeline,
            gpu_learner,
            guidance=GUIDANCE,
            steps=2,
            compile=False,
            cuda_graphs=False,
            **options,
        )
        sampler.generate(labels)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        batch = sampler.generate(labels)
        return torch.cuda.max_memory_allocated() - held, batch

    whole, expected = peak()
    bounded, batch = peak(memory_budget=whole // 4)
    assert bounded < whole / 2
    assert close(batch, expected)


def test_a_batch_that_does_not_fit_is_halved(on_gpu, pipeline_folder, gpu_learner, caplog):
    sampler = GuidedSampler(
        on_gpu(pipeline_folder), gpu_learner, guidance=GUIDANCE, steps=2, compile=False
    )
    list(sampler.stream(torch.arange(8) % 3, batch_size=8))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (160 << 20)) / total)
    try:
        batches = list(sampler.stream(torch.arange(32768) % 3, batch_size=32768))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(map(len, batches)) == 32768
    assert "out of memory" in caplog.text


def test_closing_gives_the_memory_of_captures_back(on_gpu, pipeline_folder, gpu_learner):
    sampler = GuidedSampler(
        on_gpu(pipeline_folder), gpu_learner, guidance=GUIDANCE, steps=2, compile=False
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    sampler.generate(torch.arange(512) % 3)
    held = torch.cuda.memory_reserved()
    sampler.close()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < (held - before) / 2
    sampler.generate([0, 1, 2])


def test_bfloat16_models_sample(family, on_gpu):
    folder, options = family
    pipeline = on_gpu(folder, dtype="bfloat16", **options)
    learner = learner_of(pipeline).cuda()
    sampler = GuidedSampler(pipeline, learner, guidance=GUIDANCE, steps=4, compile=False)
    batch = sampler.generate([0, 1, 2])
    assert sampler.runner.fallbacks == {}
    assert batch.skipped == 0
    assert bool(batch.entropy.isfinite().all())
