"""Train on a pool that grows, in a training loop of your own: without a recipe and a sampler.

    python examples/pool_and_loader.py

The samples are tensors of any origin; here they are noisy bars, a new class with every addition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfast

CLASSES = 6


def make_samples(label: int, count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 16, 16) uint8 of a bar in row 2 * label + 2, and their labels."""
    images = torch.randint(0, 128, (count, 1, 16, 16), dtype=torch.uint8)
    images[:, :, 2 * label + 2] += 100
    return images, torch.full((count,), label)


def main() -> list[float]:
    """Returns the share of the newest samples in the first batch after each addition."""
    torch.manual_seed(0)
    pool = dpfast.SamplePool()
    pool.append_images(*make_samples(0, 256))
    augment = dpfast.Augment(flip=True)
    loader = dpfast.make_loader(
        "torch", pool, batch_size=64, seed=0, augment=augment, fresh_weight=2.0
    )
    learner = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))
    learner(next(loader)[0])
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    shares = []
    for newest in range(1, CLASSES):
        pool.append_images(*make_samples(newest, 256))
        for step in range(20):
            images, labels = next(loader)  # (64, 1, 16, 16) float32 in [-1, 1]
            if step == 0:  # what was just appended is drawn at once
                shares.append(float((labels == newest).float().mean()))
            loss = F.cross_entropy(learner(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{len(pool)} samples, {shares[-1]:.0%} of the next batch were new, loss {loss:.3f}")
    loader.close()
    return shares


if __name__ == "__main__":
    main()
