"""Schedule, trainer, learner factory and measures."""

import math

import pytest
import torch
from torch import nn

from dpfast.config import Learner, RecipeError
from dpfast.learn.evaluate import evaluate, frechet_distance, predict
from dpfast.learn.models import build_learner, load_judge
from dpfast.learn.schedule import wsd
from dpfast.learn.trainer import Trainer


def test_wsd_warms_up_stays_and_cools_down():
    factors = [wsd(s, total=100, warmup=0.1, cooldown=0.2) for s in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:10] == sorted(factors[:10])
    assert set(factors[10:81]) == {1.0}
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert factors[90] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.01
    assert wsd(0, total=10, warmup=0.0, cooldown=0.0) == 1.0


def toy(steps=60, **options):
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), Learner(lr=0.05, **options), iterations=steps)
    images = torch.randn(48, 1, 4, 4)
    labels = images.flatten(1)[:, :3].argmax(1)
    return trainer, [float(trainer.step(images, labels)) for _ in range(steps)]


def test_training_lowers_the_loss_and_ends_at_rate_zero():
    trainer, losses = toy()
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.schedule.get_last_lr()[0] < 1e-6
    assert trainer.cooling
    assert not trainer.warming


def test_ema_follows_the_weights_by_its_decay():
    trainer, _ = toy(steps=200, ema_decay=0.9)  # (1 + n) / (10 + n) has passed 0.9
    image, label = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    old = trainer.ema.module[1].weight.clone()
    trainer.step(image, label)
    torch.testing.assert_close(trainer.ema.module[1].weight, 0.9 * old + 0.1 * trainer.model[1].weight.detach())


def test_training_is_the_same_twice():
    assert toy()[1] == toy()[1]


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("transformers:RegNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}),
        ("transformers:ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}),
        ("tests.learn.test_learn:factory", {"width": 5}),
    ],
)
def test_learners_map_images_to_logits(spec, options):
    model = build_learner(spec, classes=7, channels=1, **options)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def factory(*, classes, channels, width):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )


@pytest.mark.parametrize(
    ("spec", "options", "named"),
    [
        ("transformers:NoSuchNet", {}, "NoSuchNet"),
        ("transformers:RegNetForImageClassification", {"widht": 3}, "widht"),
        ("no_such_package:factory", {}, "no_such_package"),
        ("tests.learn.test_learn:missing", {}, "missing"),
    ],
)
def test_an_unknown_learner_is_named(spec, options, named):
    with pytest.raises(RecipeError, match=named):
        build_learner(spec, classes=7, channels=1, **options)


def test_evaluation_counts_by_hand():
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 9.0, 0], [0, 0, 0.0]])
    result = evaluate(lambda images: logits, torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 2]))
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


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    a = torch.randn(4000, 3)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 0])) == pytest.approx(9, abs=1e-6)
    # scaling by 2: tr(C + 4C - 4C) = tr C, and the mean moves by |m|
    expected = float(torch.cov(a.double().T).trace() + a.double().mean(0).square().sum())
    assert frechet_distance(a, 2 * a) == pytest.approx(expected, rel=1e-6)


def test_the_judge_knows_real_images():
    from dpfast.data.real import load_real

    test = load_real("fashion").test
    assert evaluate(load_judge(), test.images[:2000], test.labels[:2000]).top1 >= 0.91
