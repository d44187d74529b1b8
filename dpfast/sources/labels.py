"""The labels of a round's samples."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_labels(first_id: int, count: int, classes: int) -> Tensor:
    """(count,) labels of the sample ids from ``first_id`` on."""
    return labels_of(torch.arange(first_id, first_id + count), classes)


def labels_of(ids: Tensor, classes: int) -> Tensor:
    """(n,) labels of unguided samples: sample id i has label i mod classes."""
    return ids % classes


def allotted_labels(per_class: Tensor, first_id: int, count: int) -> Tensor:
    """(count,) labels in proportion to the classes' validation error; half of the samples are
    spread evenly.

    The even half keeps every class in the pool's balance, and a class without any error alive.
    Shares are rounded by largest remainder; labels take turns, so that any part of the round has
    about the same shares.
    """
    classes = len(per_class)
    error = (1 - per_class.double()).clamp(min=0)
    share = torch.full((classes,), 1 / classes, dtype=torch.float64)
    if float(error.sum()) > 0:
        share = 0.5 * share + 0.5 * error / error.sum()
    exact = share * count
    counts = exact.floor().long()
    rest = (exact - counts).argsort(descending=True, stable=True)[: count - int(counts.sum())]
    counts[rest] += 1
    labels = torch.arange(classes).repeat_interleave(counts)
    # the j-th of a class's n samples stands at (j + 1/2) / n of the round
    places = torch.cat([(torch.arange(int(n)) + 0.5) / int(n) for n in counts if n])
    return labels[places.argsort(stable=True)].roll(-(first_id % classes))
