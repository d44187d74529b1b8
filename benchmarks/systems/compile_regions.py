"""Compile time of whole steps beside that of a transformer's blocks, and the speed of both and of
eager steps.

The embedded generator, or a DiT of its width with another number of blocks and random weights. Each
compilation begins with an empty inductor cache, or with what earlier processes kept (`--kept`);
what it took is the first batch less the second, of guided and plain steps and decoding.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import diffusers
import torch
from torch._inductor.utils import fresh_inductor_cache

from benchmarks.harness import timing
from benchmarks.harness.arguments import add_device, new_parser
from dpfast.cli.parser import at_least
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.pipelines.families.dit import DiTDenoiser
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import load_judge

BATCH = 64
STEPS = 8
EVERY = 2


def pipeline_of(layers: int | None, device: torch.device) -> Pipeline:
    """The embedded pipeline, its transformer replaced by one of ``layers`` blocks; None: as it
    is.
    """
    pipeline = Pipeline.from_pretrained("fashion", device=device)
    if layers is None:
        return pipeline
    config = dict(
        diffusers.DiTTransformer2DModel.load_config(pipeline.folder / "transformer"),
        num_layers=layers,
    )
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel.from_config(config).to(device)
    steps = pipeline.scheduler.config.num_train_timesteps
    return replace(
        pipeline, denoiser=DiTDenoiser(model, classes=10, prediction="v", timesteps=steps)
    )


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    timing.synchronise(device)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("regions", __doc__)
    parser.add_argument(
        "--layers", type=at_least(1), help="blocks of the DiT; default: the embedded generator"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=3, help="timed batches of each (default 3)"
    )
    parser.add_argument(
        "--regions", default="eager,blocks,step", help="which of them (default eager,blocks,step)"
    )
    parser.add_argument(
        "--kept", action="store_true", help="begin with what earlier processes compiled and kept"
    )
    add_device(parser)
    options = parser.parse_args(arguments)
    device = options.device
    pipeline, judge = pipeline_of(options.layers, device), load_judge().to(device)
    labels = torch.arange(BATCH, device=device) % 10
    guidance = GuidanceConfig(omega=0.05, every=EVERY)
    print("| compiled | compile time, s | samples/s |\n|---|---|---|")
    for region in options.regions.split(","):
        chosen = (
            {"compile": False} if region == "eager" else {"compile": True, "compile_region": region}
        )
        sampler = GuidedSampler(pipeline, judge, guidance=guidance, steps=STEPS, **chosen)
        with contextlib.nullcontext() if options.kept else fresh_inductor_cache():
            first, *rest = (
                seconds(partial(sampler.generate, labels), device)
                for _ in range(1 + options.rounds)
            )
        compiling = "" if region == "eager" else f"{first - rest[0]:.0f}"
        print(f"| {region} | {compiling} | {BATCH / statistics.median(rest):.1f} |", flush=True)
    return 0
