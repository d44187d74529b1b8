"""The learner's training step beside a plain loop, measured: `dpfast bench learner`.

The plain loop is what timm's training script does: AdamW with decay for matrices alone, autocast,
clipping, a rate for each step, and an average of weights and buffers (`ModelEmaV3`), in torch's
defaults and with the fused AdamW, and with torch's `AveragedModel` for the average. All rows train
copies of one model on the same batches, which lie in memory, and take turns. They train the learner
of the recipe "fashion" and a vision transformer: a small one on a CPU, on a GPU ViT-B/16 of the
ImageNet recipes, 256 images of 224 px. With --tiny both have next to no weights, to try it out.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import (
    add_device,
    add_record,
    add_rows,
    check_rows,
    is_wanted,
    new_parser,
)
from dpfast.cli.parser import at_least
from dpfast.config import Learner, Recipe
from dpfast.errors import InputError
from dpfast.generate.graphs import Captured, CudaRecorder, Recorder
from dpfast.hardware.flops import count_flops
from dpfast.hardware.peaks import here
from dpfast.learn.models import build_learner
from dpfast.learn.precision import in_bf16
from dpfast.learn.trainer import Trainer, wsd
from dpfast.terminal import say

RECORDS = RESULTS / "learner.jsonl"
ITERATIONS, BATCHES = 100_000, 4
PLAIN = "plain loop"
SMALL_VIT = {
    "image_size": 96,
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
}
TINY: dict[str, dict[str, Any]] = {
    "transformers:RegNetForImageClassification": {
        "embedding_size": 4,
        "hidden_sizes": [4],
        "depths": [1],
        "groups_width": 4,
    },
    "transformers:ViTForImageClassification": {
        "image_size": 16,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    },
}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """A learner and its batches: ``size`` images of (channels, side, side) and their labels,
    probabilities if mixed.
    """

    name: str
    config: Learner
    classes: int
    channels: int
    side: int
    size: int

    def model(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        model = build_learner(
            self.config.model, classes=self.classes, channels=self.channels, **self.config.options
        )
        return model.to(device)

    def batches(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(1)
        shape = (self.size, self.channels, self.side, self.side)
        found = []
        for _ in range(BATCHES):
            images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
            labels = torch.randint(self.classes, (self.size,), device=device)
            if self.config.mixup > 0 or self.config.cutmix > 0:
                targets = F.one_hot(labels, self.classes).float()
                labels = targets.lerp(targets.flip(0), 0.3)
            found.append((images, labels))
        return found


def trainings(device: torch.device, *, tiny: bool = False) -> list[Training]:
    """A small convolutional learner and a vision transformer, as large as the device bears."""
    fashion, vit = Recipe.load("fashion").learner, Recipe.load("imagenet1k-sd15").learner
    if tiny:
        fashion, vit = (replace(each, options=TINY[each.model]) for each in (fashion, vit))
    convolutional = Training(
        name="fashion", config=fashion, classes=10, channels=1, side=32, size=4 if tiny else 64
    )
    if tiny:
        large = Training(name="a tiny ViT", config=vit, classes=10, channels=3, side=16, size=4)
    elif device.type == "cuda":
        large = Training(
            name="ViT-B/16, 224 px", config=vit, classes=1000, channels=3, side=224, size=256
        )
    else:
        small = replace(vit, options=SMALL_VIT)
        large = Training(
            name="ViT-Ti/16, 96 px", config=small, classes=1000, channels=3, side=96, size=8
        )
    return [convolutional, large]


def plain_loop(
    model: nn.Module,
    config: Learner,
    device: torch.device,
    *,
    fused: bool,
    torchs_average: bool = False,
    recorder: Recorder | None = None,
) -> Step:
    """A step of timm's script, written out; torchs_average: by ``AveragedModel``, which counts its
    updates on the host.

    recorder: captures all of the step but the rate, which is a tensor then, and replays it. The
    steps of its warm-up train, too.
    """
    model.train()
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    if torchs_average:
        rule = get_ema_multi_avg_fn(config.ema_decay)
        counted = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    factor = partial(wsd, total=ITERATIONS, warmup=config.warmup, cooldown=config.cooldown)
    schedule: Any
    if recorder is None:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=fused or None)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    else:
        rate = torch.tensor(config.lr * factor(0), device=device)
        # a CPU's optimiser knows no captures, and needs to know of none
        on_gpu = device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=fused or None, capturable=on_gpu)
        schedule = _Rate(rate, config.lr, factor)
    bf16 = in_bf16(config.precision, device)

    @torch.enable_grad()
    def compute(images: Tensor, labels: Tensor) -> _Loss:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        loss.backward()
        if config.clip_grad_norm:
            nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if torchs_average:
            counted.update_parameters(model)
            return _Loss(loss.detach())
        with torch.no_grad():
            for mean, value in zip(
                averaged.state_dict().values(), model.state_dict().values(), strict=True
            ):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - config.ema_decay)
                else:
                    mean.copy_(value)
        return _Loss(loss.detach())

    whole: Any = compute if recorder is None else Captured(compute, recorder, name="training step")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = whole(images, labels).loss
        schedule.step()
        return loss

    return step


class _Loss(NamedTuple):
    loss: Tensor


class _Rate:
    """A schedule of a rate that is a tensor, which no step waits for."""

    def __init__(self, rate: Tensor, peak: float, factor: Callable[[int], float]) -> None:
        self.rate, self.peak, self.factor, self.count = rate, peak, factor, 0

    def step(self) -> None:
        self.count += 1
        self.rate.fill_(self.peak * self.factor(self.count))


def rows(training: Training, device: torch.device, wanted: str) -> dict[str, Step]:
    """The plain loops and ours that are wanted, as ``is_wanted`` reads it, each with a copy of the
    model.
    """
    config, model = training.config, training.model(device)

    def plain(*, fused: bool = True, compile: bool = False, **options: Any) -> Step:
        mine = copy.deepcopy(model)
        if compile:
            mine.compile()
        return plain_loop(mine, config, device, fused=fused, **options)

    def ours(**changes: Any) -> Step:
        changed = replace(config, **{"compile": False, **changes})
        return Trainer(copy.deepcopy(model), changed, iterations=ITERATIONS).step

    makers: dict[str, Callable[[], Step]] = {
        PLAIN: partial(plain, fused=False),
        f"{PLAIN}, fused AdamW": plain,
        f"{PLAIN}, fused AdamW, AveragedModel": partial(plain, torchs_average=True),
        "dpfast": ours,
        "dpfast, 4 micro-batches": partial(ours, micro_batch=training.size // 4),
    }
    others: dict[str, Callable[[], Step]] = {
        "dpfast, activation checkpointing": partial(ours, activation_checkpointing=True),
        f"{PLAIN}, fused AdamW, compiled": partial(plain, compile=True),
        "dpfast, compiled": partial(ours, compile=True),
    }
    asked = wanted.split("|")  # on a CPU by their whole names alone
    makers |= {n: make for n, make in others.items() if device.type == "cuda" or f"={n}" in asked}
    captured = f"{PLAIN}, fused AdamW, captured"  # by a GPU alone
    check_rows([*makers, *others, captured], wanted)
    if device.type == "cuda":
        makers[captured] = partial(plain, recorder=CudaRecorder(device))
    return {name: make() for name, make in makers.items() if is_wanted(name, wanted)}


class _Reads(TorchDispatchMode):
    """Counts values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def host_waits(step: Step, batch: tuple[Tensor, Tensor], device: torch.device) -> int:
    """Of a step: on a GPU what torch warns of, on a CPU the values that are read."""
    if device.type != "cuda":
        with _Reads() as reads:
            step(*batch)
        return reads.count
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def measure(
    training: Training, device: torch.device, *, rounds: int, steps: int, wanted: str
) -> dict[str, Any]:
    """Seconds of a step of every row, in turns; host waits; images a second and the share of the
    peak.
    """
    made, batches = rows(training, device, wanted), training.batches(device)

    def several(step: Step) -> None:
        for number in range(steps):
            step(*batches[number % BATCHES])

    calls = {name: partial(several, step) for name, step in made.items()}
    # there and back, with pages that are used again: what a step finds depends on the row before it
    with timing.pages("reused"):
        there = timing.interleave(calls, rounds, device)
        back = timing.interleave(dict(reversed(calls.items())), rounds, device)
    timed = {name: timing.Times([*there[name].seconds, *back[name].seconds]) for name in calls}
    counted = count_flops(
        lambda: plain_loop(training.model(device), training.config, device, fused=False)(
            *batches[0]
        )
    )
    peak = None
    if device.type == "cuda":
        machine = here()
        peak = machine.half if in_bf16(training.config.precision, device) else machine.full
    found = []
    for name, step in made.items():
        times = timed[name].each(steps)
        found.append(
            {
                "row": name,
                "seconds": {"median": times.median, "minimum": times.minimum},
                "images_per_second": training.size / times.median,
                "host_waits": host_waits(step, batches[0], device),
                "share_of_peak": None if peak is None else counted / times.median / peak,
            }
        )
    return {
        "training": training.name,
        "batch": training.size,
        "rounds": 2 * rounds,
        "flops": counted,
        "rows": found,
    }


def table(record: dict[str, Any]) -> str:
    lines = [
        f"| {record['training']}, {record['batch']} images | median ms "
        "| min ms | images/s | host waits | share of the peak |",
        "|---" * 6 + "|",
    ]
    for row in record["rows"]:
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        lines.append(
            f"| {row['row']} | {row['seconds']['median'] * 1e3:.2f} | "
            f"{row['seconds']['minimum'] * 1e3:.2f} | "
            f"{row['images_per_second']:.0f} | {row['host_waits']} | {share} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("learner", __doc__)
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=15,
        help="measurements of each row in each of two orders (default 15)",
    )
    parser.add_argument(
        "--steps", type=at_least(1), help="training steps of a measurement (default 10, on a CPU 1)"
    )
    add_rows(parser)
    add_device(parser)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the trainings whose name contains TEXT"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="learners with next to no weights, a few images"
    )
    add_record(parser, "learner")
    options = parser.parse_args(arguments)
    device = options.device
    if options.steps is None:
        options.steps = 10 if device.type == "cuda" else 1
    found = trainings(device, tiny=options.tiny)
    chosen = [training for training in found if options.only in training.name]
    if not chosen:
        names = "; ".join(training.name for training in found)
        raise InputError(f"only = {options.only!r}: no training has it; there are: {names}")
    for training in chosen:
        record = measure(
            training,
            device,
            rounds=options.rounds,
            steps=options.steps,
            wanted=options.rows,
        )
        print(json.dumps(record), file=sys.stderr, flush=True)
        say(table(record))
        if options.record is not None:
            timing.append(options.record / RECORDS.name, "learner", [record], device)
    return 0
