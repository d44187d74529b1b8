"""What is frozen keeps its bits, layers learn at rates of their own, checkpoints hold both."""

import copy

import pytest
import torch
from torch import nn

from dpfast.config import Learner
from dpfast.errors import InputError
from dpfast.learn.models import build_learner
from dpfast.learn.parts import freeze, in_head, layers
from dpfast.learn.trainer import Trainer
from tests.learn.test_micro_batches import REGNET, VIT


def regnet():
    torch.manual_seed(0)
    name = "transformers:RegNetForImageClassification"
    return build_learner(name, classes=3, channels=1, **REGNET)


def vit():
    torch.manual_seed(0)
    return build_learner("transformers:ViTForImageClassification", classes=3, channels=1, **VIT)


IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6) % 3


def trained(model, steps=3, **options):
    trainer = Trainer(model, Learner(lr=0.05, **options), iterations=20)
    losses = [float(trainer.step(IMAGES, LABELS)) for _ in range(steps)]
    return trainer, losses


@pytest.mark.parametrize("make", [regnet, vit])
def test_a_frozen_backbone_and_its_statistics_keep_their_bits_and_the_head_learns(make):
    before = copy.deepcopy(make().state_dict())
    trainer, losses = trained(make(), freeze=("backbone",))
    assert losses[-1] < losses[0]
    assert trainer.parameters == list(trainer.model.model.classifier.parameters())
    for module in (trainer.model, trainer.ema.module):
        after = module.state_dict()
        assert after.keys() == before.keys()
        changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
        assert changed == {name for name in before if name.startswith("model.classifier.")}
    whole, _ = trained(make())
    assert not torch.equal(whole.model.state_dict()[min(before)], before[min(before)])


def test_a_frozen_norm_trains_as_it_is_evaluated():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3))
    model[0].running_mean.fill_(0.5)
    freeze(model, ("0",))
    expected = (IMAGES - 0.5) / (1 + model[0].eps) ** 0.5
    torch.testing.assert_close(model.train()[0](IMAGES), expected)
    half = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3))
    freeze(half, ("0.weight",))  # its bias learns, and so do its statistics
    assert isinstance(half[0], nn.BatchNorm2d)


def test_a_norm_with_two_parents_is_frozen_in_both():
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.Sequential(norm), nn.Flatten(), nn.Linear(64, 3))
    freeze(model, ("0",))
    assert model[0] is model[1][0]
    assert not isinstance(model[0], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("vit.layer",), "freeze = 'vit.layer': the learner has no such parameter; expected 'back"),
        (("backbone", "vit.layers.9"), "freeze = 'vit.layers.9': the learner has no such para"),
        (("vit", "classifier"), "freeze = 'vit,classifier': leaves nothing to train"),
        (("",), "freeze = '': the learner has no such parameter"),
    ],
)
def test_names_that_freeze_nothing_or_all_are_refused(names, said):
    with pytest.raises(InputError, match=f"^{said}"):
        trained(vit(), freeze=names)


def test_names_freeze_at_their_dots():
    model = vit()
    freeze(model, ("vit.layers.1", "vit.embeddings.cls_token"))
    frozen = {name for name, p in model.model.named_parameters() if not p.requires_grad}
    assert "vit.embeddings.cls_token" in frozen
    assert all(n.startswith(("vit.layers.1.", "vit.embeddings.cls_token")) for n in frozen)
    assert len(frozen) == 17


class Timm(nn.Module):
    """As a model of timm says which layer its head is, here not the last one."""

    def __init__(self):
        super().__init__()
        self.fc, self.stem = nn.Linear(4, 3), nn.Linear(8, 4)

    def get_classifier(self):
        return self.fc


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (regnet, {"classifier.1.weight", "classifier.1.bias"}),
        (vit, {"classifier.weight", "classifier.bias"}),
        (Timm, {"fc.weight", "fc.bias"}),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 3)), {"1.weight", "1.bias"}),
        (lambda: nn.Linear(2, 3), set()),
    ],
)
def test_the_head_is_what_the_library_calls_so(model, heads):
    learner = model()
    inner = getattr(learner, "model", learner)
    assert {name for name, _ in inner.named_parameters() if in_head(learner, name)} == heads


def test_layers_of_a_vit_are_those_of_beit():
    model = vit()
    of = layers(model)
    found = {name: of[p] for name, p in model.model.named_parameters()}
    assert found.pop("vit.layernorm.weight") == found.pop("vit.layernorm.bias") == 4
    assert found.pop("classifier.weight") == found.pop("classifier.bias") == 4
    for name, layer in found.items():
        expected = 0 if "embeddings" in name else int(name.split(".")[2]) + 1
        assert layer == expected, name


def test_a_layer_moves_by_its_share_of_the_rate():
    """AdamW's first step is the rate in each coordinate, whatever the gradient's size."""
    before = vit().model.state_dict()
    trainer, _ = trained(vit(), steps=1, layer_decay=0.5, weight_decay=0.0)
    rate = trainer.optimizer.param_groups[-1]["lr"]
    after = trainer.model.model.state_dict()
    for name, share in (
        ("classifier.weight", 1.0),
        ("vit.layers.2.mlp.fc1.weight", 0.5),
        ("vit.layers.0.mlp.fc1.weight", 0.125),
        ("vit.embeddings.patch_embeddings.projection.weight", 0.0625),
    ):
        moved = float((after[name] - before[name]).abs().max())
        assert moved == pytest.approx(rate * share, rel=1e-3), name
    decays = {
        g["weight_decay"]
        for g in Trainer(vit(), Learner(layer_decay=0.5), iterations=9).optimizer.param_groups
    }
    assert decays == {0.05, 0.0}


def test_a_learner_without_blocks_has_no_layers():
    with pytest.raises(
        InputError, match=r"^layer_decay: Sequential repeats no module .* expected 1"
    ):
        trained(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), layer_decay=0.5)


def test_betas_are_those_of_adamw():
    trainer, losses = trained(vit(), betas=(0.5, 0.9))
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.5, 0.9)}
    assert losses[0] == trained(vit())[1][0]
    assert losses[2] != trained(vit())[1][2]


def test_a_checkpoint_of_frozen_parameters_and_layers_goes_on_to_the_same_bits():
    options = {"freeze": ("vit.embeddings", "vit.layers.0"), "layer_decay": 0.7}
    whole, _ = trained(vit(), steps=6, **options)
    half, _ = trained(vit(), steps=3, **options)
    saved = {name: value.clone() for name, value in half.state_dict().items()}
    moments = {name for name in saved if name.endswith("exp_avg")}
    assert len(moments) == len(half.parameters) < len(list(half.model.parameters()))
    again, _ = trained(vit(), steps=0, **options)
    again.load_state_dict(saved)
    for _ in range(3):
        again.step(IMAGES, LABELS)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
