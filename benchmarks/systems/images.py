"""How far images and gradients are from those of plain code in bf16: `dpfast bench images`.

The generators, learner, labels and noise of `benchmarks.systems.models`, with the same weights:
each row beside (b), diffusers' own modules in a batch, and (b) itself beside (b) in fp32, which is
what bf16 changes anyway. The gradients are those of the guided steps of the trajectory in fp32.
Weights are random, so that images are noise; the final latents, which no clamp bounds, are compared
too.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_record, add_rows, is_wanted, new_parser
from benchmarks.systems.models import (
    FIRST_ID,
    Bench,
    Large,
    Record,
    Setting,
    add_settings,
    convolutions,
    settings,
)
from benchmarks.systems.naive import Batched
from dpfast.cli.parser import at_least
from dpfast.terminal import say

RECORDS = RESULTS / "images.jsonl"
EXACT = 2  # samples in fp32
Gradient = Callable[[Tensor, Tensor, Tensor], Tensor]
State = tuple[Tensor, Tensor]  # x and t of a guided step
ROWS: dict[str, dict[str, Any]] = {
    "dpfast, unfused, eager": {"compile": False, "cuda_graphs": False},
    "dpfast, fused, eager": {"fused": True, "compile": False, "cuda_graphs": False},
}


def beside(images: Tensor, others: Tensor) -> Record:
    """The largest and the mean difference of uint8 images, of 255, and the ratio of 255 to their
    root mean square in dB, None for equal ones.
    """
    difference = images.double() - others.double()
    square = float(difference.square().mean())
    return {
        "largest": float(difference.abs().max()),
        "mean": float(difference.abs().mean()),
        "psnr": None if square == 0 else 10 * math.log10(255**2 / square),
    }


def cosines(gradient: Gradient, exact: list[Tensor], states: list[State], labels: Tensor) -> Record:
    """The mean and the least cosine of a gradient to the exact one, over samples and states."""
    found = [
        torch.cosine_similarity(
            gradient(x, t, labels).flatten(1).double(), right.flatten(1).double()
        )
        for (x, t), right in zip(states, exact, strict=True)
    ]
    values = torch.cat(found)
    return {"mean": float(values.mean()), "least": float(values.min())}


def plain_gradient(models: Large, batched: Batched) -> Gradient:
    return lambda x, t, labels: batched.gradient(x, t, labels, *models.scales(t))[0]


def exact(
    bench: Bench, labels: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, list[State], list[Tensor]]:
    """(b) in fp32: its final latents and images, and the guided steps of its trajectory with
    their gradients.
    """
    models = bench.models(torch.float32)
    batched = bench.batched(models)
    states, gradients, gradient = [], [], batched.gradient

    def recorded(x: Tensor, t: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        made, prediction = gradient(x, t, *rest)
        states.append((x, t))
        gradients.append(made)
        return made, prediction

    batched.gradient = recorded  # type: ignore[method-assign]
    latents = batched.latents(labels, ids)
    return latents, _shown(models, latents), states, gradients


def _shown(models: Large, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return ((models.decode(latents) / 2 + 0.5).clamp(0, 1) * 255).round().byte()


def _apart(latents: Tensor, others: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((latents.double() - others.double()).norm() / others.double().norm())


def compare(setting: Setting, device: torch.device, samples: int, wanted: str) -> list[Record]:
    """A record for (b) beside fp32, and for each row of ``ROWS`` beside (b)."""
    bench = Bench(setting, device)
    ids = torch.arange(max(samples, EXACT), device=device)
    labels, ids = ids % setting.classes, ids + FIRST_ID
    few = labels[:EXACT]
    latents, wide, states, gradients = exact(bench, few, ids[:EXACT])
    gc.collect()
    models = bench.models()
    batched = bench.batched(models)
    base = batched.latents(labels, ids)
    images = _shown(models, base)
    records = [
        {
            "row": "(b) batched, eager",
            "against": "(b) in fp32",
            "samples": EXACT,
            **beside(images[:EXACT], wide),
            "latents": _apart(base[:EXACT], latents),
            "cosine": cosines(plain_gradient(models, batched), gradients, states, few),
        }
    ]
    for title, options in ROWS.items():
        if not is_wanted(title, wanted):
            continue
        sampler = bench.sampler(**options)
        made = sampler.generate(labels, ids)
        path = sampler.runner.parts.path
        assert path is not None
        assert made.latents is not None

        def gradient(x: Tensor, t: Tensor, labels: Tensor, path: Any = path) -> Tensor:
            scales = (scale.to(device) for scale in models.scales(t))
            return path.gradient(x, t.to(device), labels, *scales)[0]

        with torch.no_grad():
            records.append(
                {
                    "row": title,
                    "against": "(b) batched, eager",
                    "samples": len(labels),
                    **beside(made.images, images),
                    "latents": _apart(made.latents, base),
                    "cosine": cosines(gradient, gradients, states, few),
                }
            )
    return records


def table(name: str, records: list[Record]) -> str:
    """Markdown; cosines are to fp32, of both."""
    lines = [
        f"| {name} | beside | samples | largest difference of 255 | mean | PSNR, dB "
        "| of latents, of their norm | cosine to fp32, mean (least) |",
        "|---" * 8 + "|",
    ]
    for record in records:
        psnr, cosine = record["psnr"], record["cosine"]
        lines.append(
            f"| {record['row']} | {record['against']} | {record['samples']} | "
            f"{record['largest']:.0f} | {record['mean']:.3f} | "
            f"{'equal' if psnr is None else format(psnr, '.1f')} | {record['latents']:.2e} | "
            f"{cosine['mean']:.5f} ({cosine['least']:.5f}) |"
        )
    return "\n".join(lines)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("images", __doc__)
    add_settings(parser)
    add_rows(parser)
    parser.add_argument(
        "--samples", type=at_least(EXACT), default=4, help="beside (b) in bf16 (default 4)"
    )
    add_record(parser, "images")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0. Raises ``InputError`` for published sizes without a GPU."""
    options = _arguments(arguments)
    device = options.device
    for setting in settings("images", options):
        with convolutions(device, searched=False, tf32=False):  # fp32 would feel it
            records = compare(setting, device, options.samples, options.rows)
        say(table(setting.name, records))
        print(json.dumps(records), file=sys.stderr, flush=True)
        if options.record is not None:
            named = [{"model": setting.name} | record for record in records]
            timing.append(options.record / RECORDS.name, "images", named, device)
        gc.collect()
        torch.cuda.empty_cache()
    return 0
