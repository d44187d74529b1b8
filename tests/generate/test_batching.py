"""The search for a batch size, memory counted before it is used, and running out of it."""

import dataclasses
from functools import partial

import pytest
import torch

from dpfast.generate import batching
from dpfast.generate.batching import BatchSizer
from dpfast.generate.bounded import within_budget
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware import live_bytes


def search(seconds_of, **options):
    sizer = BatchSizer(**{"first": 8, "limit": 1024, **options})
    sizes = []
    while sizer.searching:
        sizes.append(sizer.size)
        sizer.report(seconds_of(sizer.size))
    return sizes, sizer.size


def test_doubling_ends_where_throughput_is_flat():
    sizes, chosen = search(lambda size: max(0.32, size * 0.01))  # 32 samples fill the machine
    assert sizes == [8, 16, 32, 64, 128]
    assert chosen == 32


def test_one_slow_batch_does_not_end_the_search():
    _, chosen = search(lambda size: 1.0 * (4 if size == 32 else 1), limit=256)
    assert chosen == 256


def test_the_limit_holds():
    assert search(lambda size: 1.0, limit=20) == ([8, 16], 16)
    assert search(lambda size: 1.0, limit=3)[1] == 3


def test_out_of_memory_halves_for_good_and_ends_at_one():
    sizer = BatchSizer(8, limit=64)
    sizer.report(1.0)
    sizer.report(1.0)
    assert sizer.size == 32
    sizer.out_of_memory(MemoryError())
    assert (sizer.size, sizer.searching) == (16, False)
    single = BatchSizer(1, limit=1)
    with pytest.raises(MemoryError):
        single.out_of_memory(MemoryError())


def test_peak_counts_what_lives_at_once():
    x = torch.zeros(1000)

    def call():
        y = x + 1  # 4000 bytes
        y = y * 2  # and 4000 beside them
        return y.view(10, 100)[:5]  # no bytes of its own

    assert live_bytes.peak_bytes(call) == 8000
    assert live_bytes.peak_bytes(lambda: x[10:]) == 0
    assert live_bytes.bytes_per_sample(lambda batch: torch.zeros(batch, 10)) == (0, 40)


def test_a_budget_bounds_what_the_gradient_holds(pipeline, learner):
    free = GuidedSampler(pipeline, learner, compile=False)
    path = free.runner.parts.path
    x, labels = torch.randn(16, 4, 8, 8), torch.zeros(16, dtype=torch.int64)

    def gradient(path):
        return path.gradient(x, torch.tensor(300), labels, torch.tensor(0.8), torch.tensor(0.6))

    whole = live_bytes.peak_bytes(lambda: gradient(path))
    path = within_budget(path, free.table, whole // 3, recompute=False)
    bounded = live_bytes.peak_bytes(lambda: gradient(path))
    assert 1 <= path.chunk < 16
    # the gradients and predictions of all chunks come on top
    assert bounded < whole // 3 + 4 * x.nbytes
    with pytest.raises(ValueError, match="memory_budget = 1000: the gradient of one sample holds"):
        GuidedSampler(pipeline, learner, memory_budget=1000).generate([0])


def test_a_budget_leaves_the_images_as_they_are(pipeline, learner):
    options = {"steps": 4, "guidance": GuidanceConfig(omega=0.1, every=2), "compile": False}
    images = GuidedSampler(pipeline, learner, **options).generate([0, 1, 2, 0, 1]).images
    sampler = GuidedSampler(pipeline, learner, memory_budget=300_000, **options)
    assert int((sampler.generate([0, 1, 2, 0, 1]).images.int() - images.int()).abs().max()) <= 1
    assert sampler.runner.parts.path.chunk < 5


def test_the_largest_batch_follows_the_available_memory(pipeline, learner, monkeypatch):
    sampler = GuidedSampler(pipeline, learner, compile=False)
    sizes = []
    for available in (1 << 28, 1 << 29):
        monkeypatch.setattr(batching, "available_bytes", lambda device, bytes=available: bytes)
        probe = partial(sampler.runner._dearest_step, sampler.variants(guided=True))
        sizes.append(batching.largest_batch(probe, torch.device("cpu")))
    assert 1.9 < sizes[1] / sizes[0] < 2.1


class Small:
    """A denoiser whose machine holds three samples at most."""

    def __init__(self, denoiser, most):
        self.denoiser, self.most, self.sizes = denoiser, most, []

    def __getattr__(self, name):
        return getattr(self.denoiser, name)

    def __call__(self, x, timestep, labels):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.denoiser(x, timestep, labels)


@pytest.mark.parametrize("batch_size", [8, "auto"])
def test_out_of_memory_halves_the_batch_and_loses_no_sample(
    batch_size, pipeline, learner, monkeypatch
):
    # as wrong as an estimate can be
    monkeypatch.setattr(batching, "available_bytes", lambda device: 1 << 40)
    # with CFG: three samples
    small = dataclasses.replace(pipeline, denoiser=Small(pipeline.denoiser, 7))
    sampler = GuidedSampler(small, learner, steps=2, compile=False)
    labels = torch.arange(19) % 3
    batches = list(sampler.stream(labels, first_id=5, batch_size=batch_size))
    assert torch.cat([b.sample_ids for b in batches]).tolist() == list(range(5, 24))
    assert torch.equal(torch.cat([b.labels for b in batches]), labels)
    assert max(len(b) for b in batches) == 2
    expected = (
        GuidedSampler(pipeline, learner, steps=2, compile=False)
        .generate(labels, torch.arange(5, 24))
        .images
    )
    assert int((torch.cat([b.images for b in batches]).int() - expected.int()).abs().max()) <= 1


def test_auto_measures_on_the_samples_themselves(pipeline):
    sampler = GuidedSampler(pipeline, steps=2, compile=False)
    batches = list(sampler.stream(torch.zeros(100, dtype=torch.int64), batch_size="auto"))
    assert [len(b) for b in batches][:2] == [8, 16]
    assert torch.cat([b.sample_ids for b in batches]).tolist() == list(range(100))
