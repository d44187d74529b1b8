"""The source "prune": of an unguided surplus the samples of the highest entropy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpfast.samples import SampleBatch
from dpfast.sources.dynamic import DynamicSource
from dpfast.sources.source import RoundRequest


class PruneSource(DynamicSource):
    """N unguided samples, then rounds of P: of ``oversample`` x P unguided candidates those of
    highest entropy.

    Candidates are scored by the learner of that moment and dropped when they are not kept. Ids
    count candidates.
    """

    streams = False  # what is kept is known when the last candidate has been scored

    def _later(self, request: RoundRequest, done: int) -> Iterator[SampleBatch]:
        practice = self.recipe.practice
        initial = self.initial_samples
        first, last = (
            initial + int(practice.oversample * (size - initial))
            for size in (request.start, request.start + request.count)
        )
        scale = self.cfg_scale(request.number)
        held: list[Tensor] = []
        for batch in self.unguided.stream(first, last - first, self.cost, cfg_scale=scale):
            batch = self._judged(batch, request)
            columns = [batch.images, batch.labels, batch.sample_ids, batch.entropy]
            if batch.latents is not None and self.recipe.pool.codec == "latents":
                columns.append(batch.latents)
            columns = [column.cpu() for column in columns]  # a round is too much for the device
            if held:
                columns = [torch.cat(pair) for pair in zip(held, columns, strict=True)]
            best = highest(columns[3], columns[1], request.count, within=practice.prune_within)
            held = [column[best] for column in columns]  # who is out now would be out at the end
        for images, labels, ids, scores, *latents in zip(
            *(c.split(self.unguided.batch) for c in held), strict=True
        ):
            yield SampleBatch(
                images=images,
                labels=labels,
                sample_ids=ids,
                entropy=scores,
                learner_step=request.learner_step,
                latents=latents[0] if latents else None,
            )


def highest(scores: Tensor, labels: Tensor, count: int, *, within: str) -> Tensor:
    """Indices, rising, of the ``count`` highest of ``scores`` (n,): "overall", or as evenly as can
    be over "class"es.

    labels: (n,) int64, on the same device. Of equal scores the first are kept.
    """
    order = scores.argsort(descending=True, stable=True)
    if within == "class":
        labels = labels.gather(0, order)
        ordered, places = labels.sort(stable=True)  # class by class, the highest first
        rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
        ranks = torch.empty_like(order).scatter_(0, places, rank)
        # every class's best, then every class's second, ...
        order = order.gather(0, ranks.argsort(stable=True))
    return order.narrow(0, 0, min(count, len(order))).sort().values
