"""Run the loop with a pipeline, a learner and real images of your own, into a folder.

    python examples/embed_loop.py runs/mine

The pipeline and the images are embedded ones here; the recipe says what no object is given for.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import dpfast
from dpfast.config import ASSETS
from dpfast.data.fashion import read_split


class Learner(nn.Sequential):
    """Images (B, 1, 32, 32) in [-1, 1] to logits (B, 10)."""

    def __init__(self) -> None:
        features = [nn.Conv2d(1, 16, 5, stride=4), nn.SiLU(), nn.Flatten()]
        super().__init__(*features, nn.Linear(16 * 49, 10))


def main(folder: str | None = None, *, resume: bool = False) -> list[dpfast.Result]:
    """Returns the results of "dp" and "static", whose learners began with the same weights."""
    recipe = dpfast.Recipe.load(
        "fashion",
        steps=4,
        initial_samples=40,
        round_samples=20,
        maximum_samples=60,
        iterations=40,
        evaluate_every=5,
        patience=1,
        patience_growth="fixed",
        yardstick_samples=20,
        learner={"batch_size": 16},
    )
    images, labels = read_split(ASSETS / "fashion_test", "t10k")  # (N, 1, 32, 32) uint8, (N,)
    torch.manual_seed(0)  # of the learner's first weights
    practice = dpfast.DeliberatePractice(
        recipe,
        pipeline=dpfast.Pipeline.from_pretrained("fashion"),
        learner=Learner(),
        real=(images[:400], labels[:400]),  # every second image of a class is held out
    )
    results = practice.run(folder, resume=resume, progress=False)
    for result in results:
        print(f"{result.source}: {len(result.pool)} samples, accuracy {result.test.top1:.1%}")
    return results


if __name__ == "__main__":
    main(*sys.argv[1:2])
