"""The answer whether a pool will fit, and where, before anything is generated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dpfast import config
from dpfast.errors import InputError, RecipeError
from dpfast.ops.dispatch import CPU
from dpfast.pool import codecs
from dpfast.pool.memory_tiers import NAMES, MemoryTiers, readable
from dpfast.pool.record import RECORD

CHUNK_BYTES = 64 << 20
# of an autoencoder of the Stable Diffusion family: 3 x 8 x 8 pixels become 4 latents
LATENT_SHRINK = 8


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The size of a pool, and the tiers that its samples will lie in.

    ``samples`` and ``in_tier`` are those of one device.
    """

    samples: int
    devices: int
    shape: tuple[int, ...]
    codec: str
    bytes_per_sample: int  # payload, for JPEG an estimate
    overhead: int  # bytes of a sample's columns
    chunk_bytes: int
    in_tier: dict[str, int]  # samples in each of ``NAMES``
    tiers: MemoryTiers

    @property
    def total_bytes(self) -> int:
        """The bytes of payloads and columns in one device's share of the pool."""
        return self.samples * (self.bytes_per_sample + self.overhead)

    @property
    def fits(self) -> bool:
        return sum(self.in_tier.values()) >= self.samples

    def __str__(self) -> str:
        where = (
            ", ".join(f"{count} in {name}" for name, count in self.in_tier.items() if count)
            or "none fits"
        )
        share = f" on each of {self.devices} devices" if self.devices > 1 else ""
        return (
            f"{self.samples} samples{share} of {self.bytes_per_sample} + {self.overhead} bytes: "
            f"{readable(self.total_bytes)} ({where})"
        )

    def check(self) -> Placement:
        """Returns the placement where it fits.

        Raises ``InputError`` with the numbers and three ways out, in the words of a recipe.
        """
        if not self.fits:
            raise InputError(self._ways_out())
        return self

    def _ways_out(self) -> str:
        budgets = ", ".join(f"{name} {readable(self.tiers.budget(name))}" for name in NAMES)
        room = sum(self.in_tier.values())
        pixels = math.prod(self.shape)
        smaller = "raise host_gib"
        if self.codec == "pixels":
            latents = (
                math.ceil(pixels / 3 / LATENT_SHRINK**2) * 4 * codecs.DTYPES["latents"].itemsize
            )
            smaller = (
                f"codec = 'latents' (about {latents} bytes a sample) or 'jpeg' "
                f"(about {int(pixels * codecs.JPEG_BYTES_PER_PIXEL)})"
            )
        devices = math.ceil(self.devices * self.samples / room) if room else self.devices + 1
        return (
            f"maximum_samples = {self.samples * self.devices}: the pool needs {self}; the budgets "
            f"are {budgets}. "
            f"Ways out: {smaller}; mapped = true with {readable(self.total_bytes)} free on the "
            f"disk, or {devices} "
            f"devices; or maximum_samples of at most {room * self.devices}"
        )

    @classmethod
    def of(
        cls,
        samples: int,
        shape: Sequence[int],
        codec: str = "pixels",
        devices: int | Sequence[object] = 1,
        *,
        tiers: MemoryTiers | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> Placement:
        """Returns the places of a pool of ``samples`` payloads of ``shape``.

        It refuses nothing by itself: ``Placement.of(...).check()`` does.

        Args:
            shape: (C, H, W) of the pixels or latents that are stored; for JPEG of the images.
            devices: over how many devices (a number, or their list) the pool is spread.
            tiers: the budgets of each device, by default what is free here.
            chunk_bytes: of a chunk at most; a small pool has one that just holds it.

        Raises ``InputError`` for an unknown codec, negative ``samples``, no device, and a sample
        that no chunk holds.
        """
        count = devices if isinstance(devices, int) else len(devices)
        if samples < 0 or count < 1:
            raise InputError(f"samples = {samples}, devices = {count}: expected at least 0 and 1")
        tiers = tiers or MemoryTiers.detect()
        payload = codecs.row_bytes(codecs.check_codec(codec), shape)
        if not 0 < payload <= chunk_bytes:
            raise InputError(
                f"a sample of shape {tuple(shape)} has {payload} bytes, a chunk {chunk_bytes}"
            )
        each = math.ceil(samples / count)
        if codec != "jpeg":
            chunk_bytes = min(chunk_bytes, max(each, 1) * payload)
        in_tier = {}
        missing = each
        columns = each * RECORD.itemsize
        for name in NAMES:
            budget = tiers.budget(name)
            if name == "host":  # where the columns always lie
                budget -= columns
            chunks = max(budget, 0) // chunk_bytes
            in_tier[name] = min(missing, chunks * (chunk_bytes // payload))
            missing -= in_tier[name]
        return cls(
            samples=each,
            devices=count,
            shape=tuple(shape),
            codec=codec,
            bytes_per_sample=payload,
            overhead=RECORD.itemsize,
            chunk_bytes=chunk_bytes,
            in_tier=in_tier,
            tiers=tiers,
        )

    @classmethod
    def from_recipe(
        cls,
        recipe: config.Pool,
        samples: int,
        shape: Sequence[int],
        *,
        device: torch.device = CPU,
        folder: Path | None = None,
        processes: int = 1,
    ) -> Placement:
        """Returns the placement of a recipe's section ``[pool]`` on this machine; the arguments of
        ``SamplePool.from_recipe``.

        Raises ``RecipeError`` with the numbers and three ways out when the samples do not fit.
        """
        tiers = MemoryTiers.from_recipe(recipe, device, folder, processes=processes)
        placement = cls.of(samples, shape, recipe.codec, tiers=tiers)
        if not placement.fits:
            raise RecipeError(placement._ways_out())
        return placement
