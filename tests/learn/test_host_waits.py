"""A training step waits for no device: the rules of a GPU's queue on tensors without data."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.config import Learner
from dpfast.learn.gradients import GradientBuckets
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.parallel import Ranks
from dpfast.practice.losses import Losses
from tests.generate.standin import HOST_READS, tensors
from tests.learn.test_micro_batches import VIT, Two

META = torch.device("meta")
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}


class Waits(TorchDispatchMode):
    """Refuses what a host waits for: reading a value, and copies between it and the device, in
    either direction.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        given = tensors((args, kwargs))
        assert name not in HOST_READS or all(tensor.is_cpu for tensor in given), (
            f"{name} reads a value"
        )
        out = func(*args, **kwargs)
        devices = {tensor.device.type for tensor in (*given, *tensors(out))}
        assert name not in COPIES or len(devices) == 1, f"{name} between {devices}"
        return out


@pytest.fixture
def trainer_of(monkeypatch):
    """Trainers on tensors without data, which are no device that torch knows fused kernels of."""
    monkeypatch.setattr(
        sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda parameter: None
    )

    def make(**options):
        with META:
            made = build_learner(
                "transformers:ViTForImageClassification", classes=5, channels=3, **VIT
            )
        return Trainer(made, Learner(clip_grad_norm=1.0, **options), iterations=20)

    return make


BATCH = torch.empty(6, 3, 8, 8, device=META), torch.empty(6, dtype=torch.int64, device=META)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"activation_checkpointing": True}])
def test_no_step_waits_for_the_device(trainer_of, options):
    trainer, losses = trainer_of(**options), Losses.__new__(Losses)
    losses.total = torch.zeros((), device=META)
    losses._bad = torch.zeros((), dtype=torch.int64, device=META)
    with Waits():
        for step in range(3):
            losses.add(trainer.step(*BATCH), step)


def test_no_step_of_several_ranks_waits_for_the_device(trainer_of):
    trainer = trainer_of(micro_batch=4)
    trainer.ranks = Ranks(size=2, learn=Two())
    trainer.gradients = GradientBuckets(trainer.parameters, trainer.ranks)
    with Waits():
        for _ in range(3):
            trainer.step(*BATCH)


def test_the_average_of_torch_would_be_refused():
    with META:
        model = nn.Linear(3, 3)
    average = AveragedModel(model, multi_avg_fn=lambda averaged, current, count: None)
    average.update_parameters(copy.deepcopy(model))
    with pytest.raises(AssertionError, match="_to_copy between"), Waits():
        average.update_parameters(model)
