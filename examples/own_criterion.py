"""Guide the loop's samples by a criterion of your own, here the Gini impurity.

python examples/own_criterion.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dpfast


def gini(logits: Tensor, labels: Tensor) -> Tensor:
    """Values (B,) of logits (B, K): 0 for a certain prediction, at most 1 - 1 / K."""
    return 1 - logits.softmax(1).square().sum(1)


def main() -> dpfast.Result:
    """Returns the result of "dp" with samples of a high impurity."""
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
    options = {"learner": learner, "sources": ["dp"], "criterion": gini}
    (result,) = dpfast.DeliberatePractice(recipe, **options).run(progress=False)
    guided = result.pool.column("entropy", start=40)  # those before had no learner to guide them
    print(f"{len(guided)} guided samples, {guided.mean():.2f} nats of entropy on average")
    return result


if __name__ == "__main__":
    main()
