"""A learner's training and evaluation, counted: FLOPs, bytes moved, and bytes held, on tensors that
hold no numbers.

The tensors are fake ones of the CPU (``FakeTensorMode``) and not those of the meta device, which
autocast does not reach: it casts the operands of products and convolutions and leaves norms,
residuals and losses in fp32, so that bf16 halves less than everything. What is counted is what an
eager step on a CPU holds, byte for byte (docs/records/scaling.md); a GPU's kernels may keep other
statistics, and its allocator's reserve comes on top (``dpfast.planning.memory``).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpfast.config import Learner
from dpfast.hardware.flops import Counts, count_work
from dpfast.hardware.live_bytes import bytes_per_sample
from dpfast.learn.checkpointing import checkpoint_activations
from dpfast.learn.models import recipe_learner
from dpfast.learn.parts import freeze
from dpfast.learn.precision import autocast

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Counts of one image in a training step and of an evaluated one, and bytes.

    parameters, trained, buffers: their numbers of elements; trained: of the parameters that are not
    frozen. held: (fixed, per image) bytes of a
    micro-batch's forward and backward pass beside weights and images, without the gradients of the
    weights; gradients: bytes of those; evaluation_held: (fixed, per image) of an evaluated batch.
    """

    training: Counts
    evaluation: Counts
    parameters: int
    trained: int
    buffers: int
    held: tuple[int, int]
    evaluation_held: tuple[int, int]

    @property
    def gradients(self) -> int:
        return 4 * self.trained

    @property
    def state(self) -> int:
        """The bytes of weights and buffers, of their average, and of AdamW's two moments of what is
        trained: what a checkpoint has as well.
        """
        return 4 * (2 * self.parameters + 2 * self.trained + 2 * self.buffers)

    def memory(self, images: int, *, accumulated: bool) -> int:
        """Returns the most bytes that a step holds beside ``state``, with micro-batches of
        ``images``.

        accumulated: gradients are there all the time, of the micro-batches before, or in the
        buckets that ranks sum; otherwise they come while what was kept for them goes.
        """
        fixed, each = self.held
        kept = fixed + each * images
        return kept + self.gradients if accumulated else max(kept, self.gradients)


def count_learner(
    learner: Learner, classes: int, image: tuple[int, ...], *, half: bool
) -> Training:
    """Counts a learner on images (C, H, W). half: under bf16 autocast.

    Raises ``InputError`` for a learner that cannot be built, and what the model raises on such
    images.
    """
    return _held(*_key(learner, classes, image, half))


def count_training(learner: Learner, classes: int, image: tuple[int, ...], *, half: bool) -> Counts:
    """Counts an image in a training step of the recipe's batch; raises as ``count_learner``
    does.
    """
    return _counted(*_key(learner, classes, image, half))


def _key(learner: Learner, classes: int, image: tuple[int, ...], half: bool) -> tuple[Any, ...]:
    options = json.dumps(learner.options, sort_keys=True)
    mixed = learner.mixup > 0 or learner.cutmix > 0
    begins = (learner.model, options, learner.pretrained, learner.freeze)
    model = (*begins, classes, image[0], learner.activation_checkpointing)
    return model, classes, tuple(image), half, mixed, learner.batch_size


@functools.lru_cache(maxsize=16)
def _fake(
    model: str,
    options: str,
    pretrained: str,
    frozen: tuple[str, ...],
    classes: int,
    channels: int,
    again: bool,
) -> tuple[FakeTensorMode, nn.Module]:
    with torch.device("meta"):
        config = Learner(model=model, options=json.loads(options), pretrained=pretrained)
        learner = recipe_learner(config, classes=classes, channels=channels)
    freeze(learner, frozen)
    if again:
        checkpoint_activations(learner)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        return mode, without_numbers(learner)


@functools.lru_cache(maxsize=64)
def _counted(
    model: tuple[Any, ...],
    classes: int,
    image: tuple[int, ...],
    half: bool,
    mixed: bool,
    batch_size: int,
) -> Counts:
    mode, learner = _fake(*model)
    step = _step(learner, image, classes, half=half, mixed=mixed)
    with mode:
        return count_work(lambda: step(batch_size)) * (1 / batch_size)


@functools.lru_cache(maxsize=64)
def _held(
    model: tuple[Any, ...],
    classes: int,
    image: tuple[int, ...],
    half: bool,
    mixed: bool,
    batch_size: int,
) -> Training:
    mode, learner = _fake(*model)
    step = _step(learner, image, classes, half=half, mixed=mixed)

    @torch.no_grad()
    def evaluate(size: int) -> None:
        with autocast(half, CPU):
            learner.eval()(torch.empty(size, *image))

    with mode:
        fixed, each = bytes_per_sample(step, first=2)  # batch norms of a single value refuse one
        evaluation = count_work(lambda: evaluate(batch_size)) * (1 / batch_size)
        evaluated = bytes_per_sample(evaluate)
    return Training(
        training=_counted(model, classes, image, half, mixed, batch_size),
        evaluation=evaluation,
        parameters=sum(p.numel() for p in learner.parameters()),
        trained=sum(p.numel() for p in learner.parameters() if p.requires_grad),
        buffers=sum(b.numel() for b in learner.buffers()),
        held=(fixed, each - 4 * math.prod(image)),  # a batch is the loader's
        evaluation_held=evaluated,
    )


def without_numbers(module: nn.Module) -> nn.Module:
    """Returns ``module`` with fake parameters and buffers of the CPU in place of its own; within a
    ``FakeTensorMode``.
    """
    known: dict[int, Any] = {}  # tied weights stay tied
    for part in module.modules():
        for named in (part._parameters, part._buffers):
            for name, tensor in named.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    fake = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                    )
                    parameter = isinstance(tensor, nn.Parameter)
                    known[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if parameter else fake
                    )
                named[name] = known[id(tensor)]
    return module


def _step(
    learner: nn.Module, image: tuple[int, ...], classes: int, *, half: bool, mixed: bool
) -> Callable[[int], None]:
    """Returns one forward and backward pass at a batch size; mixed labels are probabilities."""

    def step(size: int) -> None:
        images = torch.empty(size, *image)
        labels = torch.empty(size, classes) if mixed else torch.empty(size, dtype=torch.int64)
        with torch.enable_grad():
            with autocast(half, CPU):
                logits = learner.train()(images)
            F.cross_entropy(logits.float(), labels).backward()
        learner.zero_grad(set_to_none=True)

    return step
