"""The sources "real" and "pool": samples that exist, of which nothing has to be made.

    real_images  images of a folder
    other_pool   the samples of another run, of an export, of another's dataset

Both choose theirs in one order (``chosen``), whose beginning is the choice of a smaller run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.parallel import Ranks
from dpfast.samples import SampleBatch
from dpfast.sources.labels import LabelOrder
from dpfast.sources.source import RoundRequest, Source


class Existing(Protocol):
    """Samples in the order in which a run takes them."""

    def __len__(self) -> int: ...

    def batch(self, places: range) -> SampleBatch:
        """Returns the samples at these places, which bring their own columns. Raises ``InputError``
        for what cannot be read.
        """
        ...


class ExistingSource(Source):
    """The first ``count`` samples that exist, all at the start; they cost nothing.

    batch: samples that are read at once, which one of ``ranks`` holds.
    """

    moments: Collection[int] | None = ()
    streams = True

    def __init__(self, samples: Existing, count: int, ranks: Ranks, batch: int) -> None:
        super().__init__(count)
        self.samples, self.ranks, self.size = samples, ranks, batch

    def available(self, pool_size: int) -> int:
        return 0

    def make(self, request: RoundRequest, done: int = 0) -> Iterator[SampleBatch]:
        for places in self.ranks.batches(request.count, self.size, turn=request.turn, done=done):
            yield self.samples.batch(places)

    def steps(self, number: int) -> int:
        return 0


def chosen(labels: Tensor, order: LabelOrder, most: int, what: str) -> Tensor:
    """Returns (n,) int64 indices of at most ``most`` of the labels (N,): their classes in turn, as
    long as they last, or with class counts the labels of ``order``; of a class in the order that
    they have.

    Raises ``InputError`` that begins with ``what`` where a class has fewer than its class count
    takes.
    """
    classes = order.classes
    by_class = labels.argsort(stable=True)
    counts = labels.bincount(minlength=classes)
    starts = counts.cumsum(0) - counts
    if order.counts is None:
        number = torch.empty_like(labels)  # of a sample in its class
        number[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
        return (number * classes + labels).argsort(stable=True)[:most]
    wanted = order.of(torch.arange(min(most, int(order.counts.sum()))))
    asked = wanted.bincount(minlength=classes)
    if bool((asked > counts).any()):
        label = int((asked > counts).nonzero()[0])
        raise InputError(
            f"{what}: {int(counts[label])} samples of class {label}; expected {int(asked[label])}, "
            f"its part of {len(wanted)} by class_counts"
        )
    rows = torch.empty_like(wanted)
    places = wanted.argsort(stable=True)
    firsts = asked.cumsum(0) - asked
    within = torch.arange(len(wanted)) - firsts[wanted[places]]
    rows[places] = by_class[starts[wanted[places]] + within]
    return rows
