"""The pool: appending beside a plain copy, a batch of 6.5 million samples beside one of 10,000, and
opening.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.harness.registry import OURS, Case, Variants
from dpfast.pool.memory_tiers import MemoryTiers
from dpfast.pool.pool import SamplePool
from dpfast.pool.reader import open_pool
from dpfast.pool.saver import Saver

LATENTS = (4, 8, 8)  # fp16, 512 bytes: an image of 32 px behind an autoencoder of factor 4
SMALL = 10_000
LARGE = 6_500_000
BATCH = 256
ROWS = 1_000_000
APPEND = 256
IMAGE = (3, 224, 224)
RESERVED = 20_000
COPY = "plain copy"


class Batch(SimpleNamespace):
    """The fields of a ``SampleBatch``."""

    def __len__(self) -> int:
        return len(self.labels)


def batch_of(first: int, images: Tensor) -> Batch:
    ids = torch.arange(first, first + len(images))
    return Batch(
        images=images,
        labels=ids % 1000,
        sample_ids=ids,
        entropy=ids / 7.0,
        learner_step=0,
        origins=None,
    )


def build_append(device: torch.device) -> Variants:
    """256 images of 224 px into chunks that were reserved, as a loop does that knows how many
    samples it will add.
    """
    images = torch.empty(APPEND, *IMAGE, dtype=torch.uint8, device=device).random_(0, 256)
    new, target = batch_of(0, images), torch.zeros_like(images)
    pool = SamplePool(tiers=MemoryTiers(host_bytes=8 << 30))
    pool.append(new, round=0, omega=0.0)
    assert torch.equal(pool.images(torch.arange(APPEND)), images.cpu())
    pool.reserve(RESERVED, wait=True)
    return {COPY: lambda: target.copy_(images), OURS: lambda: pool.append(new, round=0, omega=0.0)}


@functools.lru_cache(maxsize=1)
def pools() -> tuple[SamplePool, SamplePool]:
    """Pools of SMALL and LARGE latents; the large one takes 3.7 GB."""
    made = []
    for count in (SMALL, LARGE):
        pool = SamplePool("latents", tiers=MemoryTiers(host_bytes=6 << 30))
        part = torch.randn(10_000, *LATENTS).half()
        while len(pool) < count:
            pool.append(batch_of(len(pool), part), payload=part, round=0, omega=0.0)
        made.append(pool)
    return made[0], made[1]


def build_gather(device: torch.device, *, again: bool) -> Variants:
    """256 rows and their labels, others in each call or the same ``again``, when they lie in the
    caches.

    The targets compare the two sizes: 1 / 1.2 of the small pool's speed.
    """
    small, large = pools()
    order = {pool: torch.randperm(len(pool)) for pool in (small, large)}
    position = 0

    def rows(pool: SamplePool) -> Tensor:
        nonlocal position
        position = 0 if again else (position + BATCH) % (len(pool) - BATCH)
        indices = order[pool][position : position + BATCH]
        pool.snapshot.column("label", indices)
        payload = pool.payload(indices)
        assert isinstance(payload, Tensor)
        return payload

    return {f"{SMALL:,} samples": lambda: rows(small), OURS: lambda: rows(large)}


def build_open(device: torch.device) -> Variants:
    """Opening ROWS saved latents, checksums and all, beside reading their files."""
    temporary = tempfile.TemporaryDirectory(prefix="dpfast-pool-")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    pool = SamplePool("latents", tiers=MemoryTiers(host_bytes=2 << 30))
    with Saver(pool, folder, shard_samples=100_000) as saver:
        part = torch.randn(10_000, *LATENTS).half()
        while len(pool) < ROWS:
            pool.append(batch_of(len(pool), part), payload=part, round=0, omega=0.0)
        saver.save()
    opened = open_pool(folder, tiers=pool.tiers)
    assert len(opened) == ROWS
    assert (
        opened.nbytes - ROWS * 2 * torch.Size(LATENTS).numel() <= 64 * ROWS + 2 * pool.chunk_bytes
    )
    files = sorted(folder.glob("shard-*"))
    return {
        "reading the files": lambda: sum(len(path.read_bytes()) for path in files),
        OURS: lambda: open_pool(folder, tiers=pool.tiers),
    }


CASES = [
    Case(
        tests="tests/pool/test_pool.py",
        operation="pool.append",
        size="256 x 3x224x224 uint8",
        build=build_append,
        bytes=2 * APPEND * torch.Size(IMAGE).numel(),
        targets={COPY: 0.80, "copy": 0.80},
    ),
    *(
        Case(
            tests="tests/pool/test_pool.py",
            operation="pool.payload",
            size=f"{'the same ' if again else ''}256 of {LARGE:,} x 512 bytes against {SMALL:,}",
            build=functools.partial(build_gather, again=again),
            targets={f"{SMALL:,} samples": 1 / 1.2},
        )
        for again in (True, False)
    ),
    Case(
        tests="tests/pool/test_saver.py",
        operation="pool.open",
        size=f"{ROWS:,} x 512 bytes",
        build=build_open,
    ),
]
