"""A loader of your own in Deliberate Practice: a grey square hides a part of every image.

    python examples/own_loader.py

``PoolLoader`` draws the samples, prepares batches ahead and keeps the position; a subclass starts
the work on a batch. Whatever else has the protocol ``dpfast.Loader`` will do as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

import dpfast
from dpfast.feed.loader import Made, PendingBatch, PoolLoader

SIDE = 8  # of the square, in pixels


class ErasingLoader(PoolLoader):
    """Batches of images with a grey square each (Zhong et al. 2017, "Random Erasing"), the same in
    one batch.
    """

    def start(self, drawn: Sequence[PendingBatch]) -> None:
        for pending in drawn:
            snapshot, indices = self.pool.fetch(pending.indices, device=self.device)
            images, labels = snapshot.gather(
                indices, self.form, flip=pending.draw.flips, device=self.device
            )
            # of the seed and the batch's number alone: a run that goes on draws the same
            number = pending.after["batches"]
            chance = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            top, left = torch.randint(images.shape[-1] - SIDE, (2,), generator=chance).tolist()
            images[:, :, top : top + SIDE, left : left + SIDE] = 0
            pending.work = Made((images, labels))


def main() -> dpfast.Result:
    """A run of seconds: noise stands for the real images."""
    recipe = dpfast.Recipe.load("fashion")
    short = {"initial_samples": 32, "maximum_samples": 32, "iterations": 10, "evaluate_every": 5}
    recipe = replace(
        recipe,
        generator=replace(recipe.generator, steps=2),
        learner=replace(recipe.learner, shift=0, batch_size=16),
        practice=replace(recipe.practice, sources=("dp",), **short),
    )
    real = torch.randint(0, 256, (40, 1, 32, 32), dtype=torch.uint8), torch.arange(40) % 10
    (result,) = dpfast.DeliberatePractice(recipe, real=real, loader=ErasingLoader).run()
    print(f"{len(result.pool)} samples, {result.iterations} iterations")
    return result


if __name__ == "__main__":
    main()
