"""Learners of every kind are tried out before a run makes anything: they work to the end of the
trial, or are refused in one line.
"""

import copy
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from dpfast.config import Learner
from dpfast.errors import InputError, RecipeError
from dpfast.practice.experiment import DeliberatePractice
from dpfast.practice.preflight import LearnerTrial, trial_rows
from tests.practice.small import REAL
from tests.practice.test_loop import with_

IMAGE = (1, 16, 16)


class Net(nn.Module):
    """A convolution and a head, which subclasses spoil."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 2, 1)
        self.head = nn.Linear(8, 3)

    def features(self, x):
        return self.stem(x).relu().mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def returns(function):
    """A ``Net`` whose forward is ``function(net, x)``."""
    return type("Own", (Net,), {"forward": function})


def with_buffers(**buffers):
    def made():
        net = Net()
        for name, value in buffers.items():
            net.register_buffer(name, value)
        return net

    return made


def stack(*layers):
    return lambda: nn.Sequential(*copy.deepcopy(layers), nn.Flatten(), nn.LazyLinear(3))


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 3)
        self.other.weight = self.head.weight

    def forward(self, x):
        return self.head(self.features(x)) + self.other(self.features(x))


class TiedByData(Tied):
    """Two parameters in one memory, each with a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.other.weight = nn.Parameter(self.head.weight.data)


class Twice(Net):
    """One batch norm under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.head(self.b(self.a(self.features(x)).relu()))


class ChangingViews(Net):
    """A buffer that training changes, and a part of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("part", self.mean[:4])

    def forward(self, x):
        found = self.features(x)
        if self.training:
            self.mean.lerp_(found.detach().mean(0), 0.1)
        return self.head(found - self.mean)


class Unsaved(Net):
    """What it has learnt of the scale of its features is in no state_dict."""

    scale = 1.0

    def forward(self, x):
        found = self.features(x)
        if self.training:
            self.scale = 3.0
        return self.head(found * self.scale)


class GrowsABuffer(Net):
    def forward(self, x):
        if self.training and not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(1))
        return super().forward(x)


class ExtraState(Net):
    extra: ClassVar = {"version": 1}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        assert torch.equal(torch.as_tensor(state), torch.as_tensor(self.extra))


class ExtraTensor(ExtraState):
    extra: ClassVar = torch.arange(3)


class OneValue(Net):
    """A batch norm of one value a channel and image."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.head(self.norm(self.features(x)))


class Odd(Net):
    """Parameters of odd shapes and memory: none, one, an empty one, a transposed one, an unused
    one.
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.turned = nn.Parameter(torch.randn(3, 8).t())
        self.unused = nn.Parameter(torch.randn(2))
        self.counts = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x):
        found = self.features(x)
        return self.head(found) * self.scale + found @ self.turned


class DrawsEverywhere(Net):
    def forward(self, x):
        random.random(), np.random.rand(), torch.rand(1)
        return super().forward(x)


def tried(made, *, rows=2, **config):
    LearnerTrial(
        what="learner = mine",
        kind=InputError,
        config=Learner(**config),
        image=IMAGE,
        classes=3,
        device=torch.device("cpu"),
        rows=rows,
    ).run(made)


def frozen():
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return nn.Sequential(net.requires_grad_(False), nn.Linear(8, 3))


def pooled(*layers):
    return lambda: nn.Sequential(
        *copy.deepcopy(layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


CONV = nn.Conv2d(1, 8, 3, 2, 1)
WORKS = {
    "plain": Net,
    "tied weights": Tied,
    "one module twice": Twice,
    "frozen backbone with batch norm": frozen,
    "batch norm that averages over all": pooled(CONV, nn.BatchNorm2d(8, momentum=None)),
    "batch norm without statistics": pooled(CONV, nn.BatchNorm2d(8, track_running_stats=False)),
    "spectral norm": pooled(parametrizations.spectral_norm(nn.Conv2d(1, 8, 3, 2, 1))),
    "weight norm": pooled(parametrizations.weight_norm(nn.Conv2d(1, 8, 3, 2, 1))),
    "views that stand still": with_buffers(a=torch.zeros(8), pos=torch.arange(8).expand(1, 8)),
    "extra state in a tensor": ExtraTensor,
    "odd parameters": Odd,
    "writes to its input": returns(lambda self, x: self.head(self.features(x.mul_(2)))),
    "a view of its input": returns(lambda self, x: x.flatten(1)[:, :3] * self.head.bias),
    "casts to double": lambda: returns(lambda self, x: Net.forward(self, x.double()))().double(),
    "dropout": lambda: nn.Sequential(Net(), nn.Dropout(0.5)),
    "batch norm of one value": OneValue,
    "every generator": DrawsEverywhere,
}


@pytest.mark.parametrize("made", WORKS.values(), ids=WORKS)
def test_a_learner_that_can_be_trained_and_saved_passes_and_no_generator_moves(made):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.random(), np.random.rand(), float(torch.rand(1))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    tried(made)
    assert (random.random(), np.random.rand(), float(torch.rand(1))) == before


def fails(error):
    def made():
        raise error

    return made


class Shared:
    """Builds heads on one backbone."""

    def __init__(self):
        self.backbone = Net()

    def __call__(self):
        return nn.Sequential(self.backbone, nn.Linear(3, 3))


REFUSED = {
    "auxiliary logits": (
        returns(lambda self, x: (Net.forward(self, x),) * 2 if self.training else x),
        "in training it gives a tuple; expected logits",
    ),
    "auxiliary logits in evaluation": (
        returns(lambda self, x: Net.forward(self, x) if self.training else {"logits": x}),
        "mine: it gives a dict; expected logits",
    ),
    "another number of logits in training": (
        returns(lambda self, x: Net.forward(self, x)[:, :2] if self.training else x),
        r"in training its logits are \(2, 2\) for 2 images, expected \(2, 3\)",
    ),
    "one vector": (
        returns(lambda self, x: Net.forward(self, x).mean(0)),
        r"in training its logits are \(3,\) for 2 images",
    ),
    "no image in its logits": (
        returns(lambda self, x: Net.forward(self, x).detach()),
        "in training it fails .* does not require grad",
    ),
    "not finite": (
        returns(lambda self, x: Net.forward(self, x) / 0),
        "in training its logits are not finite for 2 images",
    ),
    "not finite in evaluation": (
        returns(lambda self, x: Net.forward(self, x) / (1 if self.training else 0)),
        "mine: its logits are not finite",
    ),
    "lazy layers": (stack(CONV), "2.weight has no shape before the first batch"),
    "extra state": (ExtraState, "_extra_state is a dict, and a file of weights takes tensors"),
    "complex": (with_buffers(c=torch.zeros(2, dtype=torch.complex64)), "c is of torch.complex64"),
    "double": (lambda: Net().double(), r"fails on images of shape \(2, 1, 16, 16\): .*double"),
    "half": (lambda: Net().half(), "fails on images of shape"),
    "expanded": (with_buffers(e=torch.zeros(4).expand(3, 4)), "e is an expanded tensor"),
    "sparse": (with_buffers(s=torch.eye(3).to_sparse()), "s is sparse, and a file of weights"),
    "tied by data": (TiedByData, "head.weight and other.weight share memory"),
    "changing views": (ChangingViews, "mean and part share memory, and training changes it"),
    "state that is not saved": (Unsaved, "predicts otherwise once its weights are saved"),
    "a buffer that grows": (GrowsABuffer, "it cannot be loaded after it was saved: .*"),
    "nothing to train": (lambda: Net().requires_grad_(False), "parameters that can be trained"),
    "another argument": (
        returns(lambda self, x, y: self.head(self.features(x))),
        r"in training it fails .*'y'",
    ),
    "no message": (fails(AssertionError()), "it cannot be built: AssertionError"),
    "a key": (fails(KeyError("depth")), "it cannot be built: 'depth'"),
    "not built": (lambda: Net().to("meta"), "mine: .*meta"),
    "not copied": (
        with_buffers(product=nn.Parameter(torch.ones(3)) * 2),
        "it cannot be copied: Only Tensors created explicitly",
    ),
    "not a net in training": (
        type("Own", (Net,), {"train": lambda self, mode=True: None}),
        "in training it fails",
    ),
    "shared weights": (Shared(), "two of them share weights"),
    "another one each time": (
        lambda sizes=[8, 4]: nn.Sequential(
            nn.Flatten(), nn.Linear(256, n := sizes.pop()), nn.Linear(n, 3)
        ),
        "it cannot be loaded after it was saved",
    ),
    "sparse gradients": (
        returns(
            lambda self, x: torch.nn.functional.embedding(
                x[:, 0, 0, 0].abs().long(), self.head.weight, sparse=True
            )[:, :3]
        ),
        "in training it fails",
    ),
}


@pytest.mark.parametrize(("made", "said"), REFUSED.values(), ids=REFUSED)
def test_a_learner_that_would_fail_later_is_refused_in_one_line(made, said):
    with pytest.raises(InputError, match=said) as caught:
        tried(made)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("learner = mine: ")


def test_a_batch_norm_meets_the_smallest_micro_batch_of_the_run():
    assert trial_rows(Learner(batch_size=8), 1) == 2
    assert trial_rows(Learner(batch_size=8, micro_batch=1), 1) == 1
    assert trial_rows(Learner(batch_size=7, micro_batch=3), 1) == 1  # 3, 3 and 1
    assert trial_rows(Learner(batch_size=6, micro_batch=4), 1) == 2  # 3 and 3
    assert trial_rows(Learner(batch_size=4), 4) == 1
    with pytest.raises(InputError, match="Expected more than 1 value per channel"):
        tried(OneValue, rows=1)
    tried(Net, rows=1)


def test_activation_checkpointing_is_tried_as_well():
    with pytest.raises(InputError, match="activation_checkpointing = True: Net repeats no module"):
        tried(Net, activation_checkpointing=True)


def test_what_was_given_is_not_trained(recipe):
    given = Net()
    before = copy.deepcopy(given.state_dict())
    practice = DeliberatePractice(recipe, learner=given, real=REAL)
    for weights in (given.state_dict(), practice.new_learner().state_dict()):
        assert all(torch.equal(value, before[name]) for name, value in weights.items())


def test_a_learner_of_the_recipe_is_the_recipe_s_fault(recipe):
    recipe = with_(recipe, "learner", model="tests.practice.test_preflight:auxiliary", options={})
    with pytest.raises(
        RecipeError, match=r"model = 'tests.*auxiliary': in training it gives a tup"
    ):
        DeliberatePractice(recipe, real=REAL)


def auxiliary(classes, channels):
    return REFUSED["auxiliary logits"][0]()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet18", "expected 'transformers:Class', 'timm:name' or 'package.module:factory'"),
        (":factory", "expected 'transformers:Class'"),
        ("tests.practice.test_preflight:gives_a_dict", "gives a dict, expected an nn.Module"),
        ("tests.practice.test_preflight:raises", "'depth'"),
        ("tests.practice.test_preflight:nowhere", "has no attribute 'nowhere'"),
        ("..:x", "cannot import .."),
    ],
)
def test_a_name_that_builds_no_learner_is_refused_in_one_line(recipe, spec, said):
    with pytest.raises(InputError, match=said) as caught:
        DeliberatePractice(with_(recipe, "learner", model=spec, options={}), real=REAL)
    assert "\n" not in str(caught.value)


def gives_a_dict(classes, channels):
    return {}


def raises(classes, channels):
    raise KeyError("depth")
