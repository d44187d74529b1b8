"""Guide the loop's samples by a criterion of your own, here the Gini impurity.

python examples/own_criterion.py
"""

from __future__ import annotations

from torch import Tensor

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
        evaluate_unit="steps",
        patience=1,
        patience_growth="fixed",
        yardstick_samples=20,
        learner={"batch_size": 16},
    )
    practice = dpfast.DeliberatePractice(recipe, sources=["dp"], criterion=gini)
    (result,) = practice.run(progress=False)
    return result


if __name__ == "__main__":
    print(main().pool.column("entropy"))  # NaN for those before there was a learner
