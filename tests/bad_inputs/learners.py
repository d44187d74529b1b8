"""Learners that cannot guide or cannot be trained, and those that look like it and can."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfast.config import Recipe
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.practice.experiment import DeliberatePractice
from tests.bad_inputs.case import NEVER, Case, listed

CLASSES, SIDE = 10, 32


class Net(nn.Module):
    """A small classifier. change: of its features or logits, by a subclass."""

    def __init__(self, classes: int = CLASSES, *layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 4, 1), *layers, nn.SiLU())
        self.head = nn.Linear(8 * 64, classes)

    def forward(self, images: Tensor) -> Any:
        return self.change(self.head(self.stem(images).flatten(1)))

    def change(self, logits: Tensor) -> Any:
        return logits


def net(change: Callable[[Tensor], Any], classes: int = CLASSES) -> nn.Module:
    """A small classifier whose logits are changed."""
    made = Net(classes)
    made.change = change
    return made


def on(change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A small classifier whose images are changed."""

    class Changed(Net):
        def forward(self, images: Tensor) -> Any:
            return super().forward(change(images))

    return Changed()


def left_on(layer: nn.Module) -> nn.Module:
    """In eval mode but for one layer."""
    made = Net(CLASSES, layer).eval()
    layer.train()
    return made


def raising(error: BaseException) -> nn.Module:
    def fail(logits: Tensor) -> Tensor:
        raise error

    return net(fail)


def when_trained(change: Callable[[Tensor], Any]) -> nn.Module:
    made = Net()
    made.change = lambda x: change(x) if made.training else x
    return made


class Counting(Net):
    """Changes with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Any:
        self.calls += 1
        return super().forward(images) * self.calls


class Backwardless(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise KeyError("no backward")


class Extra(Net):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.b.weight = self.a.weight

    def change(self, logits: Tensor) -> Tensor:
        return self.b(self.a(logits).relu())


class Twice(Net):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(CLASSES, CLASSES)
        self.blocks = nn.ModuleList([block, block])

    def change(self, logits: Tensor) -> Tensor:
        for block in self.blocks:
            logits = block(logits).relu()
        return logits


class Views(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(8).expand(2, 8))
        self.register_buffer("whole", torch.zeros(8))
        self.register_buffer("part", self.whole[:4])


def frozen_body() -> nn.Module:
    made = Net(CLASSES, nn.BatchNorm2d(8))
    made.stem.requires_grad_(False)
    return made


def complex_weights() -> nn.Module:
    made = Net()
    made.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return made


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(CLASSES))


@functools.cache
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained("fashion")


@functools.cache
def unguided() -> Tensor:
    return GuidedSampler(pipeline(), steps=3, compile=False).generate([3, 8], [7, 9]).images


def _guide(learner: Any) -> list[bool]:
    """Whether samples are their own, come again, and are pushed."""
    config = GuidanceConfig(omega=0.2, every=1)
    sampler = GuidedSampler(pipeline(), learner, guidance=config, steps=3, compile=False)
    both = sampler.generate([3, 8], [7, 9])
    again, alone = sampler.generate([3, 8], [7, 9]), sampler.generate([3], [7])
    apart = (both.images[:1].int() - alone.images.int()).abs().max()
    pushed = (both.images.int() - unguided().int()).abs().amax((1, 2, 3)) > 0
    return [
        bool(apart <= 2),
        torch.equal(both.images, again.images),
        bool(pushed.all()) and both.skipped == 0,
    ]


def guiding(given: tuple[Callable[[], Any], bool], random: random.Random, folder: Path) -> Case:
    make, good = given
    torch.manual_seed(random.getrandbits(31))
    learner = make()
    right = [True, True, True] if good else NEVER
    return Case(lambda: _guide(learner), ("learner", "criterion"), right, valid=good)


def _eval(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().eval()


def _fixed(function: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return _eval(lambda: net(function))


listed(
    "learners",
    {
        "plain": (_eval(Net), True),
        "batch-norm": (_eval(lambda: Net(CLASSES, nn.BatchNorm2d(8))), True),
        "group-norm": (_eval(lambda: Net(CLASSES, nn.GroupNorm(2, 8))), True),
        "instance-norm": (_eval(lambda: Net(CLASSES, nn.InstanceNorm2d(8))), True),
        "dropout-off": (_eval(lambda: Net(CLASSES, nn.Dropout(0.5))), True),
        "function": (lambda: Net().eval().forward, True),
        "frozen": (lambda: Net().eval().requires_grad_(False), True),
        "in-training": (Net, False),
        "batch-norm-without-statistics": (
            _eval(lambda: Net(CLASSES, nn.BatchNorm2d(8, track_running_stats=False))),
            False,
        ),
        "batch-norm-left-on": (lambda: left_on(nn.BatchNorm2d(8)), False),
        "dropout-left-on": (lambda: left_on(nn.Dropout(0.5)), False),
        "dropout-of-channels-left-on": (lambda: left_on(nn.Dropout2d(0.5)), False),
        "noise": (_fixed(lambda x: x + torch.randn_like(x)), False),
        "dropout-by-function": (_fixed(lambda x: F.dropout(x, 0.3, True)), False),
        "mixing": (_fixed(lambda x: x - x.mean(0)), False),
        "mixing-a-little": (_fixed(lambda x: x + 0.05 * x.roll(1, 0)), False),
        "counting": (_eval(Counting), False),
        "one-logit": (_eval(lambda: Net(1)), False),
        "other-classes": (_eval(lambda: Net(7)), False),
        "flat": (_fixed(lambda x: x.flatten()), False),
        "further-axis": (_fixed(lambda x: x[..., None]), False),
        "features": (_eval(lambda: Net().stem), False),
        "tuple": (_fixed(lambda x: (x, x)), False),
        "table": (_fixed(lambda x: {"logits": x}), False),
        "nothing": (_fixed(lambda x: None), False),
        "array": (_fixed(lambda x: x.detach().numpy()), False),
        "detached": (_fixed(lambda x: x.detach()), False),
        "without-grad": (lambda: torch.no_grad()(Net().eval().forward), False),
        "nan": (_fixed(lambda x: x * float("nan")), False),
        "nan-in-one-class": (_fixed(lambda x: x.index_fill(1, torch.tensor(3), torch.nan)), False),
        "infinite": (_fixed(lambda x: x / 0), False),
        "nan-weights": (lambda: _nan_weights(), False),
        "whole-numbers": (_fixed(lambda x: x.argmax(1, keepdim=True).expand(-1, 10)), False),
        "complex": (_fixed(lambda x: x.to(torch.complex64)), False),
        "double": (_eval(lambda: Net().double()), False),
        "half": (_eval(lambda: Net().half()), False),
        "three-channels": (_eval(lambda: nn.Sequential(nn.Conv2d(3, 8, 3))), False),
        "other-size": (
            _eval(lambda: nn.Sequential(nn.Flatten(), nn.Linear(224 * 224, CLASSES))),
            False,
        ),
        "on-no-device": (_eval(lambda: Net().to("meta")), False),
        "changing-its-images": (_eval(lambda: on(lambda x: x.mul_(0.5))), False),
        "key-error": (_eval(lambda: raising(KeyError("pixel_values"))), False),
        "attribute-error": (_eval(lambda: raising(AttributeError("no such thing"))), False),
        "assertion": (_eval(lambda: raising(AssertionError())), False),
        "of-its-own": (_eval(lambda: raising(type("OwnError", (Exception,), {})("a\nb"))), False),
        "not-implemented": (_eval(lambda: nn.Module()), False),
        "several-lines": (_eval(lambda: raising(ValueError("\nfirst\nsecond"))), False),
        "number": (lambda: 3, False),
        "text": (lambda: "resnet18", False),
        "class": (lambda: Net, False),
        "backward-that-fails": (_fixed(Backwardless.apply), False),
    },
    guiding,
)


def _nan_weights() -> nn.Module:
    made = Net().eval()
    with torch.no_grad():
        made.head.weight.fill_(torch.nan)
    return made


RECIPE = Recipe.from_dict(
    {
        "generator": {"steps": 2, "batch_size": 10},
        "learner": {"batch_size": 8},
        "practice": {"initial_samples": 20, "round_samples": 10, "maximum_samples": 40}
        | {"iterations": 10, "evaluate_every": 5, "patience": 1, "sources": ["dp"]},
    }
)


def trained(given: tuple[Callable[[], Any], Any], random: random.Random, folder: Path) -> Case:
    """Before anything is generated a run knows whether its learner can be trained and saved. None:
    it may be refused, or the run ends.
    """
    make, good = given
    torch.manual_seed(random.getrandbits(31))
    learner = make()
    images = torch.randint(0, 256, (40, 1, SIDE, SIDE), dtype=torch.uint8)
    real = images, torch.arange(40) % CLASSES

    def run() -> str:
        practice = DeliberatePractice(RECIPE, pipeline=pipeline(), learner=learner, real=real)
        if good is None:
            practice.run(folder / "run", progress=False)
        return "made"

    return Case(run, ("learner",), NEVER if good is False else "made", valid=bool(good))


listed(
    "learners",
    {
        "plain": (Net, True),
        "in-eval-mode": (_eval(Net), True),
        "function": (lambda: Net, True),
        "batch-norm": (lambda: Net(CLASSES, nn.BatchNorm2d(8)), True),
        "batch-norm-averaging": (lambda: Net(CLASSES, nn.BatchNorm2d(8, momentum=None)), True),
        "spectral-norm": (
            lambda: Net(CLASSES, nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))),
            True,
        ),
        "dropout": (lambda: Net(CLASSES, nn.Dropout(0.5)), True),
        "frozen-body": (frozen_body, True),
        "tied": (Tied, True),
        "one-module-twice": (Twice, True),
        "views": (Views, None),
        "auxiliary-logits": (lambda: when_trained(lambda x: (x, x)), False),
        "other-logits-when-trained": (lambda: when_trained(lambda x: x[:, :7]), False),
        "nan-when-trained": (lambda: when_trained(lambda x: x * float("nan")), False),
        "fails-when-trained": (lambda: when_trained(lambda x: x.logits), False),
        "detached-when-trained": (lambda: when_trained(lambda x: x.detach()), False),
        "backward-that-fails": (lambda: when_trained(Backwardless.apply), False),
        "lazy": (lazy, None),
        "extra-state": (Extra, None),
        "all-frozen": (lambda: Net().requires_grad_(False), False),
        "without-weights": (lambda: nn.Flatten(), False),
        "without-classes": (lambda: Net(7), False),
        "one-logit": (lambda: Net(1), False),
        "on-no-device": (lambda: Net().to("meta"), False),
        "complex-weights": (complex_weights, None),
        "nan-weights": (lambda: _nan_weights().train(), False),
        "key-error": (lambda: raising(KeyError("pixel_values")), False),
        "assertion": (lambda: raising(AssertionError()), False),
        "number": (lambda: 3, False),
        "function-of-one": (lambda: lambda classes: Net(classes), False),
        "function-that-fails": (lambda: lambda: Net()["no"], False),
        "function-of-nothing": (lambda: lambda: None, False),
        "one-logit-without-batch": (lambda: net(lambda x: x[:, 0]), False),
    },
    trained,
)
