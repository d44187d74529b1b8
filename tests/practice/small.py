"""Real images of a run of seconds: noise of three classes, handed to the loop as they are."""

import torch

from dpfast.data.real import RealData

CLASSES = ("cat", "dog", "red bicycle")


def noise(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 1, 16, 16) uint8 and their labels, all classes in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % len(CLASSES)


REAL = RealData.split(*noise(60), CLASSES)
