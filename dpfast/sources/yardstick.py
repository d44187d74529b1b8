"""The yardstick: unguided samples that no pool holds, with whose entropy that of a round is
compared.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from dpfast.evaluate.measures import predict
from dpfast.generate.protocol import Sampler
from dpfast.ops import entropy
from dpfast.parallel import Ranks
from dpfast.sources.labels import LabelOrder

FIRST_ID = 1 << 40  # of ids that no pool holds


def spread_labels(count: int, labels: LabelOrder) -> Tensor:
    """Returns (count,) labels: all classes in turn, or of more classes than samples evenly spaced
    ones; of a long tail in its shares.
    """
    places, classes = torch.arange(count), labels.classes
    if labels.counts is not None:
        return labels.of(places)
    return places % classes if classes <= count else places * classes // count


class Yardstick:
    """Unguided samples, made once, when they are first asked for.

    Each rank makes and keeps its part, in batches of at most ``batch`` that halve where memory runs
    out.

    Args:
        sampler: unguided, and eager. Its samples are few: capturing steps for them would take
            memory for the rest of the run, or seconds for nothing.
        batch: samples that are made at once, at most.
        ranks: those that make them together.
        labels: those of the run's samples, in whose shares these are.
        samples: how many, on all ranks together.
    """

    def __init__(
        self, sampler: Sampler, batch: int, ranks: Ranks, *, labels: LabelOrder, samples: int
    ) -> None:
        self.sampler, self.ranks = sampler, ranks
        self.labels, self.samples = labels, samples
        self.batch = min(batch, -(-samples // ranks.size))

    @cached_property
    def images(self) -> list[Tensor]:
        """The samples of this rank, batch by batch: uint8 (n, C, H, W) on the CPU, where they take
        no room from training.
        """
        places = self.ranks.indices(self.samples, self.batch)
        labels = spread_labels(self.samples, self.labels)[places]
        batches = self.sampler.stream(labels, sample_ids=FIRST_ID + places, batch_size=self.batch)
        made = []
        for batch in batches:
            made.append(batch.images.cpu())
            self.ranks.beat()
        return made

    def entropies(self, learner: nn.Module) -> Tensor:
        """Returns (samples,) nats of the samples of all ranks under ``learner``, on the CPU. All
        ranks call it together.
        """
        mine = [entropy(predict(learner, images)).cpu() for images in self.images]
        return self.ranks.gather(
            torch.cat(mine) if mine else torch.empty(0), self.samples, self.batch
        )
