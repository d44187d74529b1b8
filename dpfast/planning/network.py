"""The sum of gradients over ranks: how long it takes, and what it adds to a training step.

A ring moves 2 (n - 1)/n of the bytes through the slowest link of every rank (the "bus bandwidth" of
nccl-tests, its doc/PERFORMANCE.md). Between nodes each of a node's devices has an adapter, and as
many rings as adapters share the bytes, so a node's link is the sum of them. The latency is that of
NCCL's tuning model for a tree (src/graph/tuning.cc, protocol Simple): a base, and there and back
the steps within a node and the depth of the tree of nodes. Gradients are fp32 and go in buckets,
each with a latency of its own, while the backward pass runs (``DistributedDataParallel``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpfast.hardware.peaks import NODE, Peaks

BUCKET = 25 << 20  # bytes, DistributedDataParallel's default
BASE = 8.4e-6  # seconds of a call
WITHIN = 4.0e-6  # seconds of a step over NVLink
BETWEEN = 14.0e-6  # seconds of a step over the network
# of a training step's FLOPs: the gradients of the input and of the weights of each layer
BACKWARD = 2 / 3


@dataclass(frozen=True, kw_only=True)
class Link:
    """Seconds of an all-reduce: ``latency`` for each bucket, then 2 (n - 1)/n of the bytes at
    ``bandwidth``.
    """

    latency: float
    bandwidth: float

    def all_reduce(self, size: float, ranks: int, *, bucket: float = BUCKET) -> float:
        """Returns seconds to sum ``size`` bytes over ``ranks`` in buckets; nothing for one rank."""
        if ranks < 2:
            return 0.0
        return (
            math.ceil(size / bucket) * self.latency
            + 2 * (ranks - 1) / ranks * size / self.bandwidth
        )


def link_of(device: Peaks, ranks: int) -> Link:
    """Returns the link derived for ``ranks`` devices in nodes of ``NODE``."""
    nodes = math.ceil(ranks / NODE)
    within, between = min(ranks, NODE) - 1, math.ceil(math.log2(nodes))
    bandwidth = device.link if nodes == 1 else min(device.link, NODE * device.network)
    return Link(latency=BASE + 2 * (within * WITHIN + between * BETWEEN), bandwidth=bandwidth)


def step_seconds(compute: float, reduce: float) -> float:
    """Returns a training step whose all-reduce runs beside its backward pass."""
    return (1 - BACKWARD) * compute + max(BACKWARD * compute, reduce)
