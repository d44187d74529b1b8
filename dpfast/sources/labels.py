"""The labels of a round's samples."""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor


class LabelOrder:
    """The one label of every sample id: balanced, or in proportion to class counts.

    Balanced, id i has label i mod K. With counts (n_1, ..., n_K) of T samples the ids 0 to T - 1
    hold exactly n_c of class c, and of the first m <= T ids those of c are m n_c / T, rounded down
    or up; from T on labels repeat. So a pool fills towards the counts after every round. Equal
    counts are the balanced order.
    """

    def __init__(self, classes: int, counts: Tensor | None = None) -> None:
        self.classes, self.counts = classes, counts
        self._order = None if counts is None else _proportional(counts.tolist())

    def of(self, ids: Tensor) -> Tensor:
        """Returns the (n,) int64 labels of sample ids (n,)."""
        return ids % self.classes if self._order is None else self._order[ids % len(self._order)]

    def between(self, first_id: int, count: int) -> Tensor:
        """Returns (count,) labels of the sample ids from ``first_id`` on."""
        return self.of(torch.arange(first_id, first_id + count))


def _proportional(counts: list[int]) -> Tensor:
    """Returns (T / g,) labels whose repetition is the order of ``LabelOrder``; g: the counts'
    common divisor.

    The j-th sample of class c may come from place floor(j T / n) on and must by place
    ceil((j + 1) T / n): of those that may, the one that must first. That keeps all of these terms
    where they can be kept, and they can: each class may take the share n / T of every place.
    """
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    waiting = [(0, label, 0) for label, count in enumerate(counts) if count]
    heapify(waiting)
    ready: list[tuple[int, int, int]] = []
    order = []
    for place in range(total):
        while waiting and waiting[0][0] <= place:
            _, label, number = heappop(waiting)
            heappush(ready, (-(-(number + 1) * total // counts[label]), label, number))
        _, label, number = heappop(ready)
        order.append(label)
        if number + 1 < counts[label]:
            heappush(waiting, ((number + 1) * total // counts[label], label, number + 1))
    return torch.tensor(order, dtype=torch.int64)


def allotted_labels(per_class: Tensor, first_id: int, count: int) -> Tensor:
    """Returns (count,) labels in proportion to the classes' validation error; half of the samples
    are spread evenly.

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
