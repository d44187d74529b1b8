"""The loaders beside an image folder and webdataset shards: batches of random samples, augmented or
not.

One call makes BATCHES batches from a cold start and prepares none beyond them: nobody works in
another's turn. The rivals have two worker processes, the loaders two threads. Augmented is a random
resized crop, a flip and the normalisation.
"""

from __future__ import annotations

import atexit
import functools
import io
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.cases.pool import batch_of
from benchmarks.harness.registry import OURS, Case, Variants
from dpfast.extras import installed
from dpfast.feed import dali_installed, make_loader
from dpfast.feed.augment import Augment
from dpfast.feed.loader import PoolLoader
from dpfast.pool.batch import BatchFormat
from dpfast.pool.codecs import to_png
from dpfast.pool.memory_tiers import MemoryTiers
from dpfast.pool.pool import SamplePool

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {32: 4096, 224: 1024}  # images of each size in pixels
BATCHES = {
    32: 16,
    224: 4,
}  # more of the small ones: a copy of their bytes shall not lie in the caches, either
WORKERS, CROP = 2, 0.08
RATIOS = math.log(3 / 4), math.log(4 / 3)
FOLDER = "PNG folder, 2 workers"
WEBDATASET = "webdataset, 2 workers"
DALI = "pool + DALI"


def decode(data: bytes, augment: bool) -> Tensor:
    """A file as a normalised image (C, H, W); Pillow crops, resizes and mirrors."""
    with Image.open(io.BytesIO(data)) as file:
        image = file.convert("RGB")
    if augment:
        area = random.uniform(CROP, 1) * image.width * image.height
        ratio = math.exp(random.uniform(*RATIOS))
        width = min(image.width, (area * ratio) ** 0.5)
        height = min(image.height, (area / ratio) ** 0.5)
        left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        image = image.resize(image.size, Image.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


class Folder(Dataset):
    """A folder of PNG files, as one would write it by hand."""

    def __init__(self, folder: Path, augment: bool) -> None:
        self.files, self.augment = sorted(folder.glob("*.png")), augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return decode(self.files[index].read_bytes(), self.augment), index % 1000


@functools.lru_cache(maxsize=2)
def data(size: int) -> tuple[Path, Tensor]:
    """Smooth images with some noise: as files, and as a tensor."""
    temporary = tempfile.TemporaryDirectory(prefix="dpfast-loader-")
    atexit.register(temporary.cleanup)
    folder, generator = Path(temporary.name), torch.Generator().manual_seed(0)
    coarse = torch.rand(SIZES[size], 3, 8, 8, generator=generator) * 230
    images = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 230)
    images = (images + torch.rand(images.shape, generator=generator) * 6).to(torch.uint8)
    for i, image in enumerate(images):
        (folder / f"{i:06d}.png").write_bytes(to_png(image.numpy()))
    return folder, images


@functools.lru_cache(maxsize=2)
def shards(size: int) -> list[str]:
    """The same files as shards of an eighth of them."""
    import webdataset

    folder = data(size)[0]
    with webdataset.ShardWriter(
        str(folder / "%04d.tar"), maxcount=SIZES[size] // 8, verbose=0
    ) as writer:
        for i, file in enumerate(sorted(folder.glob("*.png"))):
            label = str(i % 1000).encode()
            writer.write({"__key__": file.stem, "png": file.read_bytes(), "cls": label})
    return sorted(map(str, folder.glob("*.tar")))


def from_folder(size: int, batch: int, augment: bool) -> Callable[[], Any]:
    files = Folder(data(size)[0], augment)
    sampler = RandomSampler(files, replacement=True, num_samples=BATCHES[size] * batch)
    loader: DataLoader = DataLoader(
        files, batch, sampler=sampler, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: sum(len(labels) for _, labels in loader)


def from_shards(size: int, batch: int, augment: bool) -> Callable[[], Any]:
    import webdataset

    samples = webdataset.WebDataset(
        shards(size), shardshuffle=False, repeat=True, resampled=True, empty_check=False
    ).shuffle(256)
    pairs = (
        samples.shuffle(256)
        .to_tuple("png", "cls")
        .map_tuple(functools.partial(decode, augment=augment), int)
    )
    batches = pairs.batched(batch).with_epoch(BATCHES[size] // WORKERS)
    loader = webdataset.WebLoader(
        batches, batch_size=None, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: sum(len(labels) for _, labels in loader)


def from_pool(loader: PoolLoader, batches: int) -> Callable[[], Any]:
    ahead = loader.ahead

    def take() -> int:
        count = 0
        for left in reversed(range(batches)):
            loader.ahead = min(ahead, left + loader.on_demand)
            count += len(next(loader)[1])
        return count

    return take


def build(device: torch.device, *, size: int, batch: int, augment: bool) -> Variants:
    folder, images = data(size)
    pool = SamplePool(tiers=MemoryTiers.detect(device), shape=images.shape[1:])
    pool.append(batch_of(0, images), round=0, omega=0.0)
    options: dict[str, Any] = {
        "batch_size": batch,
        "seed": 0,
        "form": BatchFormat(mean=MEAN, std=STD),
        "augment": Augment(crop=CROP, flip=True) if augment else Augment(),
        "device": device,
    }
    loaders = {OURS: make_loader("torch", pool, threads=WORKERS, **options)}
    if dali_installed():
        loaders[DALI] = make_loader("dali", pool, **options)
    plain = Folder(folder, augment=False)
    shown, labels = pool.gather(torch.arange(4), options["form"])
    torch.testing.assert_close(
        shown, torch.stack([plain[i][0] for i in range(4)]), rtol=0, atol=1e-5
    )
    assert labels.tolist() == [0, 1, 2, 3]
    variants = {name: from_pool(loader, BATCHES[size]) for name, loader in loaders.items()}
    rivals = {FOLDER: from_folder(size, batch, augment)}
    if installed("webdataset"):
        rivals[WEBDATASET] = from_shards(size, batch, augment)
    for name, call in (variants | rivals).items():
        assert call() == BATCHES[size] * batch, name
    return rivals | variants


def case(size: int, batch: int, augment: bool) -> Case:
    targets = {FOLDER: 8.0 if size == 224 else 3.0} if augment and batch == 256 else {}
    return Case(
        operation="loader",
        size=f"{BATCHES[size]} x {batch} x 3x{size}x{size}, "
        f"{'crop, flip, normalise' if augment else 'normalise'}",
        tests="tests/feed/test_loader.py",
        build=functools.partial(build, size=size, batch=batch, augment=augment),
        bytes=None if augment else BATCHES[size] * batch * (3 * size * size * 5 + 8),
        targets=targets if augment else {"copy": 0.60},
    )


CASES = [
    case(size, batch, augment)
    for size in SIZES
    for batch in (64, 256, 1024)
    for augment in (True, False)
]
