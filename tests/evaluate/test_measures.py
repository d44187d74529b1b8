"""Measures against counts by hand and known distributions."""

import math
import re

import pytest
import torch
from torch import nn

from dpfast.data.real import load_real
from dpfast.errors import InputError
from dpfast.evaluate.measures import (
    by_shots,
    calibration_error,
    evaluate,
    features,
    frechet_distance,
    measure,
    neighbour_radii,
    precision_and_recall,
    predict,
    score,
)
from dpfast.hardware.live_bytes import peak_bytes
from dpfast.learn.models import JUDGES, load_judge


def test_evaluation_counts_by_hand():
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 9.0, 0], [0, 0, 0.0]])
    result = evaluate(
        lambda images: logits,
        torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        torch.tensor([0, 1, 2, 2]),
    )
    assert result.top1 == 0.5
    assert result.per_class.tolist() == [1.0, 1.0, 0.0]
    confident = math.log(1 + 2 * math.exp(-9)) + 18 * math.exp(-9) / (1 + 2 * math.exp(-9))
    assert result.entropy == pytest.approx((3 * confident + math.log(3)) / 4, rel=1e-4)


def test_prediction_leaves_the_mode_of_the_model():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    images = torch.randint(0, 256, (6, 1, 2, 2), dtype=torch.uint8)
    assert torch.allclose(predict(model, images), predict(model, images, batch_size=2), atol=1e-6)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


class Narrow(nn.Module):
    """A model whose machine holds ``most`` images."""

    def __init__(self, most):
        super().__init__()
        self.most, self.sizes = most, []

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images.flatten(1)[:, :3]


def test_evaluation_halves_its_batches_where_memory_runs_out_and_remembers():
    images, labels = torch.randint(0, 256, (60, 1, 2, 2), dtype=torch.uint8), torch.arange(60) % 3
    whole, narrow = evaluate(Narrow(60), images, labels), Narrow(20)
    found = evaluate(narrow, images, labels)
    assert (found.top1, found.loss, found.entropy) == (whole.top1, whole.loss, whole.entropy)
    assert narrow.sizes == [60, 30, 15, 15, 15, 15]
    assert narrow.training, "back in its mode"
    evaluate(narrow, images, labels)
    assert narrow.sizes[6:] == [15, 15, 15, 15]
    with pytest.raises(torch.OutOfMemoryError):
        predict(Narrow(0), images)


def test_evaluation_holds_the_logits_of_one_batch_at_a_time():
    """A thousand classes: the logits of all images would be 40 times the images."""
    images, labels = torch.zeros(4000, 1, 4, 4, dtype=torch.uint8), torch.arange(4000) % 1000
    weight = torch.randn(16, 1000)

    def model(images):
        return images.flatten(1) @ weight

    assert peak_bytes(lambda: evaluate(model, images, labels)) < 2 * peak_bytes(
        lambda: evaluate(model, images[:500], labels[:500])
    )


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    a = torch.randn(4000, 3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 0])) == pytest.approx(9, abs=1e-6)
    # scaling by 2: tr(C + 4C - 4C) = tr C, and the mean moves by |m|
    expected = float(torch.cov(a.double().T).trace() + a.double().mean(0).square().sum())
    assert frechet_distance(a, 2 * a) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_of_points_on_a_line():
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    assert neighbour_radii(real, 1).flatten().tolist() == [1.0, 1.0, 2.0, 7.0]
    made = torch.tensor([[-1.0], [-2.5], [20.0]])  # radii 1.5, 1.5, 21
    # -1 lies in the ball of 0, -2.5 in none, 20 in none; the ball of 20 alone reaches all real ones
    assert precision_and_recall(made, real, neighbours=1) == (pytest.approx(1 / 3), 1.0)
    # 0 lies in the ball of -1 (radius 1.5), the others lie in none
    assert precision_and_recall(made[:2], real, neighbours=1) == (0.5, 0.25)
    ready = neighbour_radii(real, 2)
    assert precision_and_recall(real, real, neighbours=2, real_radii=ready) == (1.0, 1.0)


def test_precision_and_recall_tell_repetition_from_strangeness():
    torch.manual_seed(0)
    real = torch.randn(1500, 4)  # more than a batch
    narrow, wide = (
        precision_and_recall(real[:40] * 0.1, real),
        precision_and_recall(torch.randn(1500, 4) * 3, real),
    )
    assert narrow[0] > 0.8
    assert narrow[1] < 0.01
    assert wide[0] < 0.5
    assert wide[1] > 0.9


def test_features_are_what_the_last_layer_of_the_judge_reads():
    judge, images = load_judge(), load_real("fashion").test.images[:5]
    found = features(judge, images)
    assert found.shape == (5, 256)
    assert torch.allclose(judge.model.classifier(found), predict(judge, images), atol=1e-5)


@pytest.mark.parametrize("number", JUDGES)
def test_each_judge_knows_real_images(number):
    test = load_real("fashion").test
    assert evaluate(load_judge(number), test.images[:2000], test.labels[:2000]).top1 >= 0.91


def test_the_judges_are_two_and_err_on_their_own():
    test = load_real("fashion").test
    logits = [predict(load_judge(number), test.images[:1000]) for number in JUDGES]
    wrong = torch.stack([each.argmax(1) != test.labels[:1000] for each in logits])
    assert len(wrong) == 2
    assert torch.equal(logits[0], predict(load_judge(), test.images[:1000]))
    assert (wrong[0] ^ wrong[1]).sum() > 0.25 * wrong.any(0).sum()
    for number in (0, 3, "regnet", 1.5, True, 2.0, [1], None):
        message = re.escape(f"judge = {number!r}: expected one of 1, 2")
        with pytest.raises(InputError, match=message):
            load_judge(number)


def test_calibration_error_of_known_confidences():
    # two of four predictions at 0.9 are right, all four at 0.6: 4/8 |0.5 - 0.9| + 4/8 |1 - 0.6|
    top = torch.tensor([0.9] * 4 + [0.6] * 4)
    logits = torch.stack([top, 1 - top], 1).log()
    labels = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0])
    assert calibration_error(logits, labels) == pytest.approx(0.4, abs=1e-6)
    assert calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0])) == pytest.approx(
        0, abs=1e-9
    )


def test_top_five_and_a_class_without_images():
    logits = torch.arange(7.0).expand(3, 7)
    result = measure([score(logits, torch.tensor([6, 2, 1]))], 7)
    assert (result.top1, result.top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert result.per_class[6] == 1
    assert math.isnan(result.per_class[0])


def test_accuracies_by_shots_are_means_over_the_classes_of_a_group():
    """The borders are ImageNet-LT's: 101 is many, 100 and 20 are medium, 19 is few."""
    per_class = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.25, float("nan"), 0.0])
    counts = torch.tensor([1280, 101, 100, 20, 19, 5, 0])
    found = by_shots(per_class, counts)
    assert {name: count for name, (_, count) in found.items()} == {"many": 2, "medium": 2, "few": 2}
    wanted = {"many": 0.85, "medium": 0.55, "few": 0.125}
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(wanted)
    assert by_shots(per_class[:2], counts[:2]).keys() == {"many"}
    assert by_shots(per_class[5:6], counts[5:6]) == {}
