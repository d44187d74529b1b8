"""The choice of the fewest steps, and records that outlive a killed run."""

import pytest
import torch

from benchmarks.systems import fewer_steps


def record(steps, entropy, agreement):
    return {"steps": steps, "entropy_change": (entropy, 0.0), "agreement_change": (agreement, 0.0)}


def test_the_fewest_steps_keep_entropy_and_agreement():
    reference, lost, hard, few, better = (
        record(*values)
        for values in (
            (20, 0.0, 0.0),
            (6, 0.0, -0.011),
            (6, 0.051, 0.0),
            (8, -0.05, -0.01),
            (8, 0.02, 0.0),
        )
    )
    assert fewer_steps.fewest([reference, lost, hard, few, better]) is better
    assert fewer_steps.fewest([reference, lost, hard, few]) is few
    assert fewer_steps.fewest([lost, hard]) is None


def test_changes_are_taken_sample_by_sample():
    base = torch.tensor([0.1, 0.3]), torch.tensor([1.0, 1.0])
    made = fewer_steps.beside((base[0] + 0.02, torch.tensor([1.0, 0.0])), base)
    assert made["entropy_change"] == pytest.approx((0.1, 0.0), abs=1e-6)
    assert made["agreement_change"] == pytest.approx((-0.5, 0.5))


def test_a_finished_record_is_not_made_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    first = fewer_steps.kept(tmp_path, {"row": "a"}, make)
    assert fewer_steps.kept(tmp_path, {"row": "a"}, make) == first == {"row": "a", "value": 1}
    assert fewer_steps.kept(tmp_path, {"row": "b"}, make)["value"] == 2
