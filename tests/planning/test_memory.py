"""Planned memory against measured memory: of training steps byte by byte, of generation by the
record of a GPU.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from dpfast.config import Learner
from dpfast.hardware.live_bytes import bytes_per_sample, peak_bytes
from dpfast.learn.models import build_learner
from dpfast.learn.trainer import Trainer
from dpfast.planning.memory import GRAPHS, RESERVED
from dpfast.planning.training import count_learner

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "models.jsonl"
LEARNERS = {
    "ViT": {
        "hidden_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
    "RegNet": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 128],
        "depths": [1, 1, 2, 1],
        "groups_width": 16,
    },
    "ResNet": {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2]},
}
SIDE = 64


def learner_of(kind, **fields):
    options = LEARNERS[kind] | ({"image_size": SIDE, "patch_size": 16} if kind == "ViT" else {})
    return Learner(
        model=f"transformers:{kind}ForImageClassification", options=options, batch_size=32, **fields
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_training_step_holds_what_is_planned(kind, precision):
    config = learner_of(kind, precision=precision, mixup=0.2)
    planned = count_learner(config, 10, (3, SIDE, SIDE), half=precision == "bf16")
    model = build_learner(config.model, classes=10, channels=3, **config.options)
    trainer = Trainer(model, config, iterations=100)
    trainer.step(torch.randn(2, 3, SIDE, SIDE), torch.full((2, 10), 0.1))  # AdamW makes its moments
    state = sum(t.nbytes for name, t in trainer.state_dict().items() if "/" in name)
    assert planned.state == pytest.approx(state, rel=0.01)
    for size in (4, 16, 32):
        images, labels = torch.randn(size, 3, SIDE, SIDE), torch.full((size, 10), 0.1)

        @torch.enable_grad()
        def step():
            trainer.step(images, labels)  # noqa: B023

        measured = state + peak_bytes(step)
        assert planned.state + planned.memory(size, accumulated=False) == pytest.approx(
            measured, rel=0.1
        ), size


@pytest.mark.skipif(
    "DPFAST_MEMORY" not in os.environ,
    reason="minutes and gigabytes; DPFAST_MEMORY=1 runs it, -s shows",
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", LEARNERS)
def test_published_learners_hold_what_is_planned(kind, precision):
    config = Learner(
        model=f"transformers:{kind}ForImageClassification",
        batch_size=64,
        precision=precision,
        mixup=0.2,
    )
    planned = count_learner(config, 1000, (3, 224, 224), half=precision == "bf16")
    trainer = Trainer(build_learner(config.model, classes=1000, channels=3), config, iterations=100)
    for size in (4, 8, 16):
        images, labels = torch.randn(size, 3, 224, 224), torch.full((size, 1000), 0.001)
        trainer.step(images[:2], labels[:2])
        step = torch.enable_grad()(lambda: trainer.step(images, labels))  # noqa: B023
        guess, found = planned.memory(size, accumulated=False), peak_bytes(step)
        print(
            f"| {kind} | {precision} | {size} | {guess / 1e6:.1f} | {found / 1e6:.1f} | "
            f"{guess / found:.3f} |"
        )
        assert guess == pytest.approx(found, rel=0.1)


def test_checkpointed_activations_are_planned_as_they_are_measured():
    config = learner_of("ViT", precision="fp32", activation_checkpointing=True)
    planned = count_learner(config, 10, (3, SIDE, SIDE), half=False)
    assert (
        planned.held[1]
        < 0.6 * count_learner(learner_of("ViT"), 10, (3, SIDE, SIDE), half=False).held[1]
    )
    trainer = Trainer(
        build_learner(config.model, classes=10, channels=3, **config.options),
        config,
        iterations=100,
    )
    images, labels = torch.randn(32, 3, SIDE, SIDE), torch.zeros(32, dtype=torch.int64)
    trainer.step(images, labels)
    step = torch.enable_grad()(lambda: trainer.step(images, labels))
    assert planned.memory(32, accumulated=False) == pytest.approx(peak_bytes(step), rel=0.1)


def test_gradients_are_there_all_the_time_where_micro_batches_add_up():
    config = learner_of("RegNet", precision="fp32", micro_batch=8)
    planned = count_learner(config, 10, (3, SIDE, SIDE), half=False)
    trainer = Trainer(
        build_learner(config.model, classes=10, channels=3, **config.options),
        config,
        iterations=100,
    )
    images, labels = torch.randn(32, 3, SIDE, SIDE), torch.zeros(32, dtype=torch.int64)
    trainer.step(images, labels)
    step = torch.enable_grad()(lambda: trainer.step(images, labels))
    assert planned.memory(8, accumulated=True) == pytest.approx(peak_bytes(step), rel=0.1)


def test_autocast_halves_less_than_everything():
    full, half = (
        count_learner(learner_of("ViT"), 10, (3, SIDE, SIDE), half=half) for half in (False, True)
    )
    assert 0.55 < half.held[1] / full.held[1] < 0.75  # norms and residuals stay in fp32
    # the weights that autocast has cast are kept
    assert half.held[0] > full.held[0] + 2 * full.parameters * 0.8
    assert half.training.half == full.training.full
    assert half.training.full == 0


def test_moments_that_do_not_grow_with_the_batch_do_not_hide_those_that_do():
    def step(batch):
        kept = torch.zeros(batch, 10)  # for the backward pass
        del kept
        torch.zeros(75)  # gradients, when that is gone

    # at 2 and 4 samples alone both peaks are the gradients': 300 bytes
    assert bytes_per_sample(step) == (
        0,
        40,
    )
    assert bytes_per_sample(lambda batch: torch.zeros(batch + 5, 10)) == (200, 40)


def test_a_count_ends_where_memory_does():
    def step(batch):
        if batch > 4:
            raise torch.OutOfMemoryError("no more")
        return torch.zeros(batch**2, 10)

    assert bytes_per_sample(step, first=2)[1] == (16 - 4) * 40 // 2
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        bytes_per_sample(step, first=4)


def test_the_allocators_reserve_is_what_a_gpu_recorded():
    counted = {
        "dit-xl-2": (9.640e9, 1.243e9),
        "stable-diffusion-1.5": (19.218e9, 2.064e9),
    }  # a batch; all weights
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    found = {
        (record["model"], record["row"]): (record["peak_bytes"] - weights) / batch
        for record in records
        for batch, weights in [counted[record["model"]]]
    }
    assert found["dit-xl-2", "dpfast, eager"] == pytest.approx(RESERVED["transformer"], rel=0.01)
    assert found["stable-diffusion-1.5", "dpfast, eager"] == pytest.approx(
        RESERVED["unet"], rel=0.01
    )
    graphs = found["dit-xl-2", "dpfast, CUDA graphs"] / found["dit-xl-2", "dpfast, eager"]
    assert graphs == pytest.approx(GRAPHS, rel=0.01)
