"""Placements: bytes and places before anything is generated, and what a refusal says."""

import pytest
import torch

from dpfast import config
from dpfast.errors import InputError, RecipeError
from dpfast.pool.memory_tiers import MemoryTiers
from dpfast.pool.placement import Placement
from dpfast.pool.pool import SamplePool
from tests.pool.helpers import SHAPE, batch

GIB = 1 << 30


def test_the_paper_s_pool_of_pixels_and_latents():
    """6.5 M images of 256 px: 1.28 TB of pixels; as fp16 latents of 512 px 213 GB (both without
    columns).
    """
    pixels = Placement.of(6_500_000, (3, 256, 256), tiers=MemoryTiers(host_bytes=64 * GIB))
    assert pixels.bytes_per_sample == 196_608
    assert pixels.overhead <= 64
    assert pixels.samples * pixels.bytes_per_sample == pytest.approx(1.28e12, rel=0.01)
    latents = Placement.of(
        6_500_000, (4, 64, 64), "latents", tiers=MemoryTiers(host_bytes=300 * GIB)
    )
    assert latents.samples * latents.bytes_per_sample == pytest.approx(213e9, rel=0.01)
    assert latents.fits
    assert not pixels.fits


def test_devices_share_the_pool_and_tiers_fill_in_order(tmp_path):
    tiers = MemoryTiers(
        device="cpu",
        device_bytes=10 * GIB,
        host_bytes=10 * GIB,
        folder=tmp_path,
        file_bytes=900 * GIB,
    )
    placed = Placement.of(1_000_000, (3, 256, 256), devices=["a", "b"], tiers=tiers).check()
    assert placed.samples == 500_000
    assert placed.in_tier["device"] == 160 * ((64 << 20) // 196_608)
    assert placed.in_tier["host"] < placed.in_tier["device"]  # the columns take their part
    assert sum(placed.in_tier.values()) == 500_000


def test_what_a_placement_promises_a_pool_holds():
    tiers = MemoryTiers(host_bytes=300_000)
    refused = Placement.of(2600, SHAPE, tiers=tiers, chunk_bytes=1 << 12)
    assert not refused.fits
    room = refused.in_tier["host"]
    placed = Placement.of(room, SHAPE, tiers=tiers, chunk_bytes=1 << 12).check()
    pool = SamplePool(tiers=tiers, chunk_bytes=1 << 12)
    pool.append(batch(0, room), round=0, omega=0.0)
    assert pool.in_tier() == placed.in_tier


def test_a_refusal_has_the_numbers_and_three_ways_out():
    with pytest.raises(InputError) as error:
        Placement.of(
            6_500_000, (3, 256, 256), devices=8, tiers=MemoryTiers(host_bytes=64 * GIB)
        ).check()
    message = str(error.value)
    for part in (
        "maximum_samples = 6500000",
        "196608 + 56 bytes",
        "148.8 GiB",
        "host 64 GiB",
        "codec = 'latents' (about 8192 bytes a sample)",
        "mapped = true with 148.8 GiB free",
        "or 19 devices",
        "maximum_samples of at most 2",
    ):
        assert part in message
    assert "\n" not in message


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="devices = 0"):
        Placement.of(1, (1, 8, 8), devices=0)
    with pytest.raises(ValueError, match="codec = 'gif'"):
        Placement.of(1, (1, 8, 8), "gif")
    with pytest.raises(ValueError, match="a chunk 64"):
        Placement.of(1, (1, 16, 16), chunk_bytes=64)


def test_a_recipe_s_pool_is_checked_and_placed_as_planned(tmp_path):
    section = config.Pool(host_gib=300_000 / GIB, mapped=True)
    pool = SamplePool.from_recipe(section, 5000, SHAPE, folder=tmp_path)
    pool.reserve(5000, wait=True)  # before any append: the recipe knows the shape
    pool.append(batch(0, 5000), round=0, omega=0.0)
    assert pool.in_tier() == {
        "device": 0,
        "host": 0,
        "file": 5000,
    }  # the host has no room for it
    with pytest.raises(RecipeError, match=r"maximum_samples = 5000: .*mapped = true"):
        SamplePool.from_recipe(config.Pool(host_gib=300_000 / GIB), 5000, SHAPE)
    with pytest.raises(RecipeError, match=r"mapped = true: there is no folder"):
        SamplePool.from_recipe(section, 5000, SHAPE)


def test_a_cpu_is_a_device_whose_budget_is_filled_first():
    section = config.Pool(device_gib=110_000 / GIB, host_gib=400_000 / GIB)
    pool = SamplePool.from_recipe(section, 2000, SHAPE)
    pool.append(batch(0, 2000), round=0, omega=0.0)
    assert pool.in_tier() == {
        "device": 0,
        "host": 2000,
        "file": 0,
    }  # one chunk of 216,000 bytes, which the device lacks
    pool = SamplePool.from_recipe(section, 1000, SHAPE)
    pool.append(batch(0, 1000), round=0, omega=0.0)
    assert pool.in_tier() == {"device": 1000, "host": 0, "file": 0}
    assert torch.equal(pool.images(torch.arange(1000)), batch(0, 1000).images)


def test_a_small_pool_needs_no_more_than_its_samples():
    section = config.Pool(host_gib=70_000 / GIB)
    pool = SamplePool.from_recipe(section, 400, SHAPE)
    pool.append(batch(0, 400), round=0, omega=0.0)
    assert pool.chunk_bytes == 400 * 108
    assert pool.in_tier()["host"] == 400


def test_a_reserve_of_jpeg_files_goes_by_those_before_them():
    guessed = SamplePool(
        "jpeg", chunk_bytes=1 << 14, tiers=MemoryTiers(host_bytes=1 << 20), shape=(3, 64, 64)
    )
    guessed.reserve(10)
    assert len(guessed._spares) == 4  # half a byte for each of 12,288 values
    pool = SamplePool("jpeg", chunk_bytes=1 << 14, tiers=MemoryTiers(host_bytes=1 << 20))
    with pytest.raises(ValueError, match="give the pool a shape, or append first"):
        pool.reserve(1)
    pool.append(batch(0, 10), round=0, omega=0.0)
    pool.reserve(90, wait=True)
    reserved = pool.nbytes + len(pool._spares) * pool.chunk_bytes
    pool.append(batch(10, 85), round=0, omega=0.0)
    assert pool.nbytes <= reserved
