"""The real images of a run: a validation half that drives patience and a held-out half that is only reported."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dpfast.config import ASSETS, RecipeError
from dpfast.data import fashion


@dataclass(frozen=True)
class RealSet:
    """images: (N, C, H, W) uint8; labels: (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RealData:
    """What a run knows of the real world. Neither set is ever trained on."""

    classes: tuple[str, ...]
    validation: RealSet
    test: RealSet


def load_real(name: str) -> RealData:
    """Loads an embedded set.

    "fashion": the 10,000 Fashion-MNIST test images in their order; even positions are validation, odd ones test.

    Raises ``RecipeError`` for an unknown name.
    """
    if name != "fashion":
        raise RecipeError(f"validation = {name!r}: no such set of real images; known is 'fashion'")
    images, labels = fashion.read_split(ASSETS / "fashion_test", "t10k")
    return RealData(
        classes=fashion.CLASSES,
        validation=RealSet(images[0::2].contiguous(), labels[0::2].contiguous()),
        test=RealSet(images[1::2].contiguous(), labels[1::2].contiguous()),
    )
