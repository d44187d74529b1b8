"""The pool and its loaders on a GPU: the batches of a CPU, without a copy on the host."""

import pytest
import torch

from dpfast.feed import dali_installed, make_loader
from dpfast.feed.augment import Augment
from dpfast.ops import chunk_rows
from dpfast.pool.batch import BatchFormat
from dpfast.pool.memory_tiers import MemoryTiers
from dpfast.pool.pool import SamplePool
from tests.pool import helpers

DALI = pytest.param(
    "dali", marks=pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")
)
MOVED = Augment(flip=True, shift=2)
EVERYTHING = Augment(flip=True, crop=0.3, size=(12, 10), mixup=0.2, cutmix=1.0)
GPU = torch.device("cuda", 0)
CURRENT = torch.device("cuda")  # what a recipe's device is
ROW = 3 * 14 * 16
TIERS = {
    "device": {"device": GPU, "device_bytes": 1 << 30},
    "pinned": {"host_bytes": 1 << 30},
    "both": {"device": GPU, "device_bytes": 1 << 20, "host_bytes": 1 << 30},
}


def pool_of(tiers, count, device, codec="pixels", **options):
    budgets = MemoryTiers(**TIERS[tiers]) if device == "cuda" else MemoryTiers(host_bytes=1 << 30)
    pool = SamplePool(codec, tiers=budgets, chunk_bytes=1 << 18, **options)
    grow(pool, count, device)
    return pool


def grow(pool, count, device):
    made = helpers.batch(len(pool), count, (3, 14, 16))
    made.images = made.images.to(device)
    pool.append(made, round=0, omega=0.0)


@pytest.mark.parametrize("tiers", TIERS)
def test_a_pool_of_any_tier_gives_back_what_it_was_given(tiers):
    pool = pool_of(tiers, 5000, "cuda")
    places = torch.randperm(5000)[:700]
    wanted = helpers.pixels(places, (3, 14, 16))
    assert torch.equal(pool.images(places), wanted)
    on_device = pool.snapshot.images(places, device=GPU)
    assert on_device.is_cuda
    assert torch.equal(on_device.cpu(), wanted)
    assert (
        set(pool.snapshot.tiers)
        == {"device": {"device"}, "pinned": {"host"}, "both": {"device", "host"}}[tiers]
    )


@pytest.mark.parametrize("kind", ["torch", DALI])
@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize(
    "augment", [Augment(), Augment(flip=True), EVERYTHING], ids=["plain", "flip", "everything"]
)
def test_batches_are_those_of_a_cpu(kind, tiers, augment, monkeypatch):
    # It goes chunk by chunk with a wait for each: for what no kernel reads.
    monkeypatch.setattr(chunk_rows, "reference", None)
    form = BatchFormat(mean=0.4, std=0.3)
    device, host = (
        make_loader(
            kind,
            pool_of(tiers, 300, where),
            batch_size=32,
            seed=3,
            classes=10,
            augment=augment,
            form=form,
            device=to,
        )
        for where, to in (("cuda", CURRENT), ("cpu", torch.device("cpu")))
    )
    for _ in range(12):
        images, labels = next(device)
        expected, wanted = next(host)
        assert images.is_cuda
        assert images.stride() == expected.stride()
        torch.testing.assert_close(labels.cpu(), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            images.cpu(), expected, rtol=0, atol=2e-2 if augment is EVERYTHING else 1e-5
        )
    device.close()
    host.close()


def test_the_torch_loader_never_waits_for_the_device():
    loader = make_loader(
        "torch",
        pool_of("device", 300, "cuda"),
        batch_size=32,
        seed=3,
        augment=MOVED,
        device=CURRENT,
    )
    next(loader)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loader.close()


@pytest.mark.parametrize("kind", ["torch", DALI])
def test_an_append_on_the_device_shows_in_the_next_batch(kind):
    pool = pool_of("device", 32, "cuda")
    loader = make_loader(kind, pool, batch_size=32, seed=3, device=GPU)
    for _ in range(3):
        next(loader)
    grow(pool, 32 * 40, "cuda")
    seen = torch.cat([next(loader)[1] for _ in range(8)])
    assert len(seen.unique()) == 10
    position = loader.state_dict()
    after = [next(loader) for _ in range(3)]
    loader.load_state_dict(position)
    for (images, labels), (again, same) in zip(
        after, [next(loader) for _ in range(3)], strict=True
    ):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
    loader.close()


@pytest.mark.parametrize("kind", ["torch", DALI])
def test_jpeg_files_are_decoded(kind):
    pool = SamplePool("jpeg", tiers=MemoryTiers(host_bytes=1 << 30))
    smooth = torch.linspace(20, 230, 16).expand(40, 3, 16, 16).to(torch.uint8)
    made = helpers.batch(0, 40, (3, 16, 16))
    made.images = smooth.cuda()
    pool.append(made, round=0, omega=0.0)
    loader = make_loader(
        kind, pool, batch_size=8, seed=3, device=GPU, form=BatchFormat(mean=0.0, std=1 / 255)
    )
    images, _ = next(loader)
    assert images.is_cuda
    torch.testing.assert_close(images.cpu(), smooth[:8].float(), rtol=0, atol=6.0)
    loader.close()


def test_latents_are_decoded_on_the_device_and_shown_on_the_host(on_gpu, pipeline_folder):
    decode = on_gpu(pipeline_folder).guidance_decoder
    pool = SamplePool("latents", tiers=MemoryTiers(**TIERS["device"]), decode=decode)
    made = helpers.batch(0, 64)
    made.latents = helpers.latents(torch.arange(64)).cuda()
    pool.append(made, round=0, omega=0.0)
    loader = make_loader(
        "torch", pool, batch_size=16, seed=3, device=GPU, form=BatchFormat(mean=0.0, std=1 / 255)
    )
    images, labels = next(loader)
    assert images.is_cuda
    assert labels.is_cuda
    shown = pool.images(torch.arange(64))
    assert shown.device.type == "cpu"
    expected = (
        decode(made.latents.float()).add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8).cpu()
    )
    assert int((shown.int() - expected.int()).abs().max()) <= 1
    loader.close()
