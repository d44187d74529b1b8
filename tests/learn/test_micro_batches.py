"""A step in micro-batches: the same gradients, less memory, and out of memory as no more than a
reason for halves.
"""

import gc
import weakref

import pytest
import torch
from torch import nn

from dpfast.config import Learner
from dpfast.errors import InputError
from dpfast.feed.augment import Mix
from dpfast.learn.checkpointing import checkpoint_activations, repeated_blocks
from dpfast.learn.gradients import GradientBuckets
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.parallel import Ranks
from dpfast.parallel.groups import Group

MIXED = Mix(0.7, (0, 3, 1, 4))
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
REGNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 8}


class Scarce(torch.autograd.Function):
    """As if memory ran out for more than ``limit`` images, in the forward or in the backward
    pass.
    """

    @staticmethod
    def forward(ctx, x, limit, where):
        ctx.limit, ctx.where = limit, where
        if where == "forward" and len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.where == "backward" and len(gradient) > ctx.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient, None, None


class Scarcity(nn.Module):
    def __init__(self, limit, where):
        super().__init__()
        self.limit, self.where = limit, where

    def forward(self, x):
        return Scarce.apply(x, self.limit, self.where)


def model(limit=1000, where="forward"):
    torch.manual_seed(0)
    hidden = (
        nn.Linear(16, 24),
        Scarcity(limit, where),
        nn.Dropout(0.3),
        nn.GELU(),
        nn.Linear(24, 24),
    )
    return nn.Sequential(nn.Flatten(), *hidden, nn.GELU(), nn.Linear(24, 3))


def batch(count=10, *, mixed=False):
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 3
    return MIXED.apply(images, labels, 3) if mixed else (images, labels)


def trainer_of(made, **options):
    torch.manual_seed(5)
    return Trainer(made, Learner(lr=0.01, precision="fp32", **options), iterations=20)


def gradients_of(made, images, labels, **options):
    trainer = trainer_of(made, **options)
    loss = trainer.step(images, labels)
    return [loss, *(p.grad for p in trainer.parameters)]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 4, 5])  # 4: the last one has two images
def test_micro_batches_give_the_gradients_and_the_loss_of_the_whole_batch(mixed, micro_batch):
    def found(**options):
        made = model().eval()
        made[3].p = 0.0
        return gradients_of(made, *batch(mixed=mixed), label_smoothing=0.1, **options)

    for part, whole in zip(found(micro_batch=micro_batch), found(), strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_goes_on_in_halves_as_if_the_run_had_begun_so(where):
    scarce, small = trainer_of(model(3, where)), trainer_of(model(), micro_batch=2)
    for trainer in (scarce, small):
        torch.manual_seed(7)
        for _ in range(3):
            trainer.step(*batch())
    assert scarce.micro_batch == 2  # of ten images 10 and 5 do not fit
    state, wanted = scarce.state_dict(), small.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(state[name], value), name


def test_an_image_that_does_not_fit_is_an_error_and_changes_no_weight():
    trainer = trainer_of(model(0))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(*batch())
    assert all(
        torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()
    )
    assert trainer.step_count == 0


class Two(Group):
    """Two ranks of which the other one always has the same; counts what is sent."""

    sent = 0

    def __init__(self):
        super().__init__("two")

    def all_reduce(self, value, *, wait=True):
        Two.sent += 1
        value.mul_(2)
        return self

    def wait(self):
        pass


def shared(made, **options):
    trainer, Two.sent = trainer_of(made, **options), 0
    trainer.ranks = Ranks(size=2, learn=Two())
    trainer.gradients = GradientBuckets(trainer.parameters, trainer.ranks, bucket_bytes=500)
    return trainer


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_every_bucket_is_sent_once_a_step_and_whole(micro_batch):
    trainer, alone = (
        shared(model(), micro_batch=micro_batch),
        trainer_of(model(), micro_batch=micro_batch),
    )
    for step in range(2):
        torch.manual_seed(step)
        trainer.step(*batch())
        torch.manual_seed(step)
        alone.step(*batch())
        assert Two.sent == len(trainer.gradients.buckets) * (step + 1)
        for mine, whole in zip(trainer.parameters, alone.parameters, strict=True):
            torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-5, atol=1e-7)


def test_a_bucket_leaves_while_earlier_layers_are_still_differentiated():
    made, left = model(), []
    made[1].weight.register_post_accumulate_grad_hook(lambda _: left.append(Two.sent))
    trainer = shared(made, micro_batch=5)
    trainer.step(*batch())
    first, last = left
    assert first == 0, "micro-batches before the last one send nothing"
    assert 0 < last < len(trainer.gradients.buckets)


def test_a_rank_that_runs_out_of_memory_after_it_has_sent_owes_nobody_anything():
    trainer, alone = shared(model(3, "backward")), trainer_of(model(), micro_batch=2)
    trainer.model[3].p = alone.model[3].p = 0.0
    trainer.step(*batch())
    alone.step(*batch())
    assert trainer.micro_batch == 2
    assert Two.sent == len(trainer.gradients.buckets)
    for mine, whole in zip(trainer.parameters, alone.parameters, strict=True):
        torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-5, atol=1e-7)


def saved_bytes(made, images, labels):
    """What a forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nn.functional.cross_entropy(made(images), labels)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("spec", "options", "blocks"),
    [
        ("transformers:ViTForImageClassification", {**VIT, "hidden_dropout_prob": 0.2}, 3),
        ("transformers:RegNetForImageClassification", REGNET, 3),
    ],
)
def test_checkpointed_activations_change_the_memory_and_nothing_else(spec, options, blocks):
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3

    def build():
        torch.manual_seed(0)
        return build_learner(spec, classes=3, channels=1, **options)

    states = []
    for checkpointing in (False, True):
        trainer = trainer_of(build(), activation_checkpointing=checkpointing)
        for _ in range(2):
            trainer.step(images, labels)
        states.append(trainer.state_dict())
    plain, checkpointed = states
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-6, msg=name)
    made = build().train()
    assert len(repeated_blocks(made)) == blocks
    whole = saved_bytes(made, images, labels)
    checkpoint_activations(made)
    assert saved_bytes(made, images, labels) < 0.6 * whole


def test_a_network_without_repeated_blocks_is_named():
    with pytest.raises(
        InputError, match="activation_checkpointing = True: Sequential repeats no module"
    ):
        trainer_of(model(), activation_checkpointing=True)


def test_a_learner_of_several_ranks_is_freed_with_its_trainer():
    model = nn.Linear(4, 4)
    buckets = GradientBuckets(list(model.parameters()), Ranks(size=2))
    freed = weakref.ref(model.weight)
    del model, buckets
    gc.collect()
    assert freed() is None
