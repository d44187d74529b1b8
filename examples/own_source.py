"""Add samples from a source of your own beside "static": unguided ones that the learner mistakes.

python examples/own_source.py
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

import dpfast


class Mistaken(dpfast.Source):
    """Rounds of 20: of twice as many unguided samples the half with the likeliest other class."""

    moments = (10, 15)  # rounds come after these steps; without it patience decides

    def begin(self, loop: dpfast.LoopView) -> None:
        self.loop = loop

    def available(self, pool_size: int) -> int:
        return min(20, 80 - pool_size)

    def make(self, request: dpfast.RoundRequest, done: int = 0) -> Iterator[dpfast.SampleBatch]:
        first, count = request.start, request.count
        if request.number:  # ids count candidates, so that none comes twice
            first, count = 40 + 2 * (request.start - 40), 2 * request.count
        for batch in self.loop.unguided.stream(first, count, self.cost, cfg_scale=1.5):
            if not request.number:
                yield batch
                continue
            odds = self.loop.learner(batch.images.float() / 127.5 - 1).softmax(1)
            right = odds.gather(1, batch.labels[:, None]).flatten()
            yield batch.take(right.argsort()[: len(batch) // 2])


def main() -> list[dpfast.Result]:
    """Returns the results of "static" and of the source, which is called "mistaken"."""
    recipe = dpfast.Recipe.load(
        "fashion",
        steps=4,
        initial_samples=40,
        maximum_samples=60,
        iterations=20,
        evaluate_every=5,
    )
    sources = ["static", Mistaken(initial_samples=40)]
    learner = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10))
    practice = dpfast.DeliberatePractice(recipe, learner=learner, sources=sources)
    results = practice.run(progress=False)
    for result in results:
        print(f"{result.source}: {len(result.pool)} samples, {result.cost.samples} made")
    return results


if __name__ == "__main__":
    main()
