"""Real images as a caller hands them to a run: tensors and Datasets."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dpfast.data.real import given_real
from tests.bad_inputs.case import NEVER, Case, listed

COUNT = 8
LABELS = torch.arange(COUNT) % 2
CLASSES = ("cat", "dog")


class Items(Dataset):
    """What a list holds; an exception in it is raised."""

    def __init__(self, items: list[Any], count: Any = None) -> None:
        self.items, self.count = items, count

    def __len__(self) -> int:
        return len(self.items) if self.count is None else self.count

    def __getitem__(self, number: int) -> Any:
        if isinstance(self.items[number], BaseException):
            raise self.items[number]
        return self.items[number]


def each(image: Callable[[Tensor], Any], label: Callable[[int], Any] = int) -> Any:
    """A Dataset whose images and labels are changed one by one."""
    return lambda images: Items(
        [(image(x), label(y)) for x, y in zip(images, LABELS.tolist(), strict=True)]
    )


def raising(error: BaseException) -> Any:
    """A Dataset whose last item cannot be read."""
    return lambda images: Items([*zip(images[1:], LABELS[1:].tolist(), strict=True), error])


def real(given: tuple[Callable[[Tensor], Any], bool], random: random.Random, folder: Path) -> Case:
    make, good = given
    images = torch.randint(
        0, 256, (COUNT, 1, 8, 8), generator=torch.Generator().manual_seed(random.getrandbits(31))
    ).byte()
    handed = make(images)

    def run() -> Any:
        found = given_real(handed, classes=CLASSES, shape=(1, 8, 8))
        return found.validation.images, found.test.images, found.validation.labels.tolist()

    halves = [
        torch.stack([images[i] for i in range(COUNT) if i // 2 % 2 == half]).numpy()
        for half in (0, 1)
    ]
    right: Any = (*halves, [0, 1, 0, 1]) if good else NEVER
    return Case(run, ("real",), right, valid=good)


def _tensors(image: Callable[[Tensor], Any], label: Callable[[Tensor], Any] = Tensor.clone) -> Any:
    return lambda images: (image(images), label(LABELS))


def _same(images: Tensor) -> Tensor:
    return images


def _unit(images: Tensor) -> Tensor:
    return images / 255


listed(
    "given",
    {
        "tensors": (_tensors(_same), True),
        "floats": (_tensors(_unit), True),
        "doubles": (_tensors(lambda x: x.double() / 255), True),
        "bytes-as-labels": (_tensors(_same, Tensor.byte), True),
        "with-gradient": (_tensors(lambda x: _unit(x).requires_grad_()), True),
        "nan": (_tensors(lambda x: (x / 255).index_fill(0, torch.tensor(3), torch.nan)), False),
        "infinite": (_tensors(lambda x: x / 0), False),
        "floats-of-bytes": (_tensors(Tensor.float), False),
        "negative-floats": (_tensors(lambda x: x / 127.5 - 1), False),
        "int32": (_tensors(Tensor.int), False),
        "truth-values": (_tensors(lambda x: x > 100), False),
        "complex": (_tensors(lambda x: x.to(torch.complex64)), False),
        "sparse": (_tensors(lambda x: _unit(x).to_sparse()), False),
        "on-no-device": (_tensors(lambda x: x.to("meta")), False),
        "channels-last": (_tensors(lambda x: x.permute(0, 2, 3, 1)), False),
        "without-channels": (_tensors(lambda x: x[:, 0]), False),
        "other-size": (_tensors(lambda x: x[..., :4]), False),
        "none": (_tensors(lambda x: x[:0], lambda y: y[:0]), False),
        "arrays": (_tensors(Tensor.numpy, Tensor.numpy), True),
        "lists": (_tensors(Tensor.tolist, Tensor.tolist), False),
        "label-negative": (_tensors(_same, lambda y: y - 1), False),
        "label-too-high": (_tensors(_same, lambda y: y + 1), False),
        "label-floats": (_tensors(_same, Tensor.float), False),
        "label-truth": (_tensors(_same, Tensor.bool), False),
        "label-one-hot": (_tensors(_same, lambda y: torch.eye(2)[y].long()), False),
        "label-too-few": (_tensors(_same, lambda y: y[1:]), False),
        "one-class-missing": (_tensors(_same, torch.zeros_like), False),
        "three": (lambda x: (x, LABELS, LABELS), False),
        "one": (lambda x: (x,), False),
        "dataset": (each(_same), True),
        "dataset-of-arrays": (each(Tensor.numpy), True),
        "dataset-of-pictures": (each(lambda x: Image.fromarray(x[0].numpy())), True),
        "dataset-of-16-bits": (
            each(lambda x: Image.fromarray(x[0].numpy().astype(np.uint16) << 8)),
            True,
        ),
        "dataset-of-float-pictures": (each(lambda x: Image.fromarray(x[0].float().numpy())), False),
        "dataset-of-paths": (each(lambda x: "a.png"), False),
        "dataset-of-nothing": (lambda x: Items([None] * COUNT), False),
        "dataset-of-tables": (
            lambda x: Items([{"image": i, "label": 0} for i in x]),
            False,
        ),
        "dataset-of-three": (lambda x: Items([(i, 0, 1) for i in x]), False),
        "dataset-of-channels-last": (each(lambda x: x.permute(1, 2, 0).numpy()), False),
        "dataset-of-sparse": (each(lambda x: _unit(x).to_sparse()), False),
        "dataset-label-whole-float": (each(_same, float), True),
        "dataset-label-fraction": (each(_same, lambda y: y / 2), False),
        "dataset-label-nan": (each(_same, lambda y: float("nan")), False),
        "dataset-label-null": (each(_same, lambda y: None), False),
        "dataset-label-name": (each(_same, lambda y: CLASSES[y]), False),
        "dataset-label-truth": (each(_same, bool), False),
        "dataset-label-negative": (each(_same, lambda y: -y), False),
        "dataset-label-huge": (each(_same, lambda y: 10**30), False),
        "dataset-label-one-hot": (each(_same, lambda y: torch.eye(2)[y]), False),
        "dataset-empty": (lambda x: Items([]), False),
        "dataset-longer-than-it-is": (lambda x: Items([(i, 0) for i in x], 10), False),
        "dataset-of-negative-length": (lambda x: Items([(i, 0) for i in x], -1), False),
        "dataset-of-no-length": (lambda x: Items([(i, 0) for i in x], "8"), False),
        "dataset-key-error": (raising(KeyError("image")), False),
        "dataset-disk": (raising(OSError(5, "Input/output error")), False),
        "dataset-assertion": (raising(AssertionError()), False),
        "dataset-stop": (raising(StopIteration()), False),
        "dataset-of-its-own": (raising(type("Own", (Exception,), {})("a\nb")), False),
        "iterator": (lambda x: iter(zip(x, LABELS.tolist(), strict=True)), False),
        "text": (lambda x: "photos", False),
        "number": (lambda x: 3, False),
        "class": (lambda x: Items, False),
    },
    real,
)
