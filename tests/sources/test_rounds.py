"""What a recipe may change about the rounds: when they are asked for, how many, how they are guided
and drawn.
"""

import pytest
import torch

from dpfast.practice.experiment import DeliberatePractice
from dpfast.sources.costs import pruning_ratio
from tests.practice.small import REAL
from tests.practice.test_loop import run, with_


@pytest.fixture
def dp(recipe):
    return with_(recipe, "practice", sources=("dp",))


def test_tau_may_be_passes_over_the_initial_samples(dp, tmp_path):
    passes = with_(dp, "practice", evaluate_unit="passes", evaluate_every=2, iterations=40)
    _, metrics = run(passes, tmp_path / "run")
    steps = [m["step"] for m in metrics if m["event"] == "evaluation"]
    assert steps == list(range(8, 41, 8))  # 2 x 30 samples in batches of 8


def test_rounds_end_at_their_maximum(dp):
    (result,) = DeliberatePractice(with_(dp, "practice", maximum_rounds=1), real=REAL).run(
        progress=False
    )
    assert (len(result.pool), result.additions) == (45, 1)
    (result,) = DeliberatePractice(with_(dp, "practice", maximum_rounds=0), real=REAL).run(
        progress=False
    )
    assert (len(result.pool), result.additions) == (30, 0)


def test_omega_and_cfg_follow_their_rounds_and_so_does_the_cost(dp):
    scheduled = with_(dp, "practice", omega_rounds=(0.1, 0.3), cfg_scale_rounds=(2.0, 1.0))
    (result,) = DeliberatePractice(scheduled, real=REAL).run(progress=False)
    omega, cfg = (result.pool.column(name) for name in ("omega", "cfg_scale"))
    assert omega.tolist() == pytest.approx([0.0] * 30 + [0.1] * 15 + [0.3] * 25)
    assert cfg.tolist() == [1.5] * 30 + [2.0] * 15 + [1.0] * 25
    # three steps; a scale of 1 halves their forwards
    assert result.cost.forwards == 45 * 6 + 25 * 3


def test_a_round_may_be_unguided(dp):
    (result,) = DeliberatePractice(with_(dp, "practice", omega_rounds=(0.0, 0.2)), real=REAL).run(
        progress=False
    )
    plain = (
        DeliberatePractice(with_(dp, "practice", sources=("static",)), real=REAL)
        .run(progress=False)[0]
        .pool
    )
    rows = torch.arange(30, 45)
    assert torch.equal(result.pool.images(rows), plain.images(rows))
    assert bool(torch.isfinite(result.pool.column("entropy")[rows]).all())


def test_fresh_samples_may_be_drawn_more_often(dp, tmp_path):
    """Training differs from the first addition on, and from nowhere else."""
    _, even = run(dp, tmp_path / "even")
    _, fresh = run(with_(dp, "practice", fresh_weight=5.0), tmp_path / "fresh")
    first = next(i for i, m in enumerate(even) if m["event"] == "addition")
    assert even[: first + 1] == fresh[: first + 1]
    assert even[first + 1]["loss"] != fresh[first + 1]["loss"]


@pytest.mark.parametrize(
    ("entropy", "ratio"),
    [(0.5, 1.0), (1.5, 1.0), (2.0, 4 / 3), (2.25, 1.6), (2.5, 2.0), (3.0, 4.0), (9.0, 4.0)],
)
def test_the_pruning_ratio_is_the_surplus_whose_best_are_as_hard(entropy, ratio):
    """Of 0, 1, 2, 3 the means of the highest one to four are 3, 2.5, 2 and 1.5."""
    assert pruning_ratio(torch.tensor([2.0, 0.0, 3.0, 1.0]), entropy) == pytest.approx(ratio)
