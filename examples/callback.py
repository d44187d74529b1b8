"""Hear what happens in a loop: here the accuracies, and when samples are added.

python examples/callback.py
"""

from __future__ import annotations

import torch
from torch import nn

import dpfast


class Curve(dpfast.Callback):
    """Keeps (step, validation accuracy), and prints a line for each round."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_evaluation(self, progress: dpfast.Progress, evaluation, loss: float) -> None:
        self.points.append((progress.step, evaluation.top1))

    def on_round(self, progress: dpfast.Progress, addition: dpfast.Addition) -> None:
        print(f"{progress.source} has {progress.pool_size} samples at step {progress.step}")


def main() -> list[tuple[int, float]]:
    """Returns the accuracies of a run of "dp"."""
    recipe = dpfast.Recipe.load(
        "fashion",
        steps=4,
        initial_samples=40,
        round_samples=20,
        maximum_samples=60,
        iterations=20,
        evaluate_every=5,
        add_at=[10],  # a round after ten steps; without it patience decides
        yardstick_samples=20,
        learner={"batch_size": 16},
    )
    torch.manual_seed(0)  # of the learner's first weights
    learner = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10))
    curve = Curve()
    options = {"learner": learner, "sources": ["dp"], "callbacks": [curve]}
    dpfast.DeliberatePractice(recipe, **options).run(progress=False)
    for step, accuracy in curve.points:
        print(f"step {step}: {accuracy:.1%}")
    return curve.points


if __name__ == "__main__":
    main()
