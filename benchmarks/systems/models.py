"""Guided sampling at the sizes that people use, measured: `dpfast bench models`, on a GPU.

DiT-XL/2 at 256 px and Stable Diffusion 1.5 at 512 px in bf16, guided by ViT-B/16 at 224 px in every
fifth of 20 DDIM steps through the tiny decoder. Weights are random, which changes neither FLOPs nor
bytes. All rows make the same number of samples from labels to uint8 images on the device; their
rivals are those of `benchmarks.systems.naive`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from benchmarks import RESULTS
from benchmarks.harness import timing
from benchmarks.harness.arguments import new_parser
from benchmarks.systems.naive import Batched, Models, Predecessor
from dpfast.cli.parser import at_least
from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware.peaks import here
from dpfast.planning.architectures import (
    BETAS,
    DIT_XL_2,
    PIXELS,
    SD15,
    VAE,
    frozen,
    published,
    vit_b_16,
)
from dpfast.planning.methods import Method, PartFlops, dit_xl_2, stable_diffusion_15

RECORDS = RESULTS / "models.jsonl"
STEPS = 20
EVERY = 5
OMEGA = 0.03
CFG = 1.5
CLASSES = 1000
BATCHES = {"dit-xl-2": 32, "stable-diffusion-1.5": 16}
WORKS = {
    "dit-xl-2": dit_xl_2,
    "stable-diffusion-1.5": lambda: stable_diffusion_15(512),
}
DTYPE = torch.bfloat16
Make = Callable[[Tensor, Tensor], Tensor]
Record = dict[str, Any]


class Learner(nn.Module):
    """ViT-B/16 at 224 px in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.model = frozen(vit_b_16(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(DTYPE))


class Resized(nn.Module):
    """What plain code puts before a learner of one image size."""

    def __init__(self, learner: nn.Module, size: int = 224) -> None:
        super().__init__()
        self.learner, self.size = learner, (size, size)

    def forward(self, images: Tensor) -> Tensor:
        return self.learner(
            nn.functional.interpolate(images, self.size, mode="bilinear", antialias=True)
        )


@dataclass(frozen=True)
class Large(Models):
    """Diffusers' own modules of a published architecture; latents in fp32, networks in bf16."""

    prompts: Tensor | None = None

    @classmethod
    def build(cls, name: str, learner: nn.Module) -> Large:
        side = PIXELS[name] // 8
        if name == "dit-xl-2":
            network, prompts = diffusers.DiTTransformer2DModel(sample_size=side, **DIT_XL_2), None
        else:
            network = diffusers.UNet2DConditionModel(sample_size=side, **SD15).to(
                memory_format=torch.channels_last
            )
            prompts = torch.randn(CLASSES + 1, 77, 768)
        vae, tiny = diffusers.AutoencoderKL(**VAE), diffusers.AutoencoderTiny()
        scheduler = diffusers.DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, **BETAS[name]
        )
        return cls(frozen(network), frozen(vae), frozen(tiny), scheduler, Resized(learner), prompts)

    def predict(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        steps = t.to(x.device).expand(len(x))
        if self.prompts is None:
            out = self.transformer(x.to(DTYPE), timestep=steps, class_labels=labels).sample
        else:
            out = self.transformer(
                x.to(DTYPE), steps, encoder_hidden_states=self.prompts[labels]
            ).sample
        return out[:, : x.shape[1]].float()

    def null(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, CLASSES)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(DTYPE)).sample.float()

    def decode_tiny(self, latents: Tensor) -> Tensor:
        return self.tiny.decode(latents.to(DTYPE)).sample.float()


@dataclass(kw_only=True)
class Row:
    """One way to make guided samples: (labels, ids) to uint8 images. size: samples of a call."""

    name: str
    make: Make
    unguided: Make
    method: Method
    size: int
    ours: bool = False


def rows(name: str, batch: int, folder: Path, wanted: list[str]) -> dict[str, Callable[[], Row]]:
    """Makers of the rows, so that only one at a time holds its memory."""
    torch.manual_seed(0)
    device = torch.device("cuda")

    def built(make: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with device:
                return make()
        finally:
            torch.set_default_dtype(before)

    learner = frozen(built(Learner))

    def predecessor() -> Row:
        models = built(lambda: Large.build(name, learner))
        guided, plain = (
            Predecessor(models, folder / kind, steps=STEPS, every=EVERY, omega=omega, cfg_scale=CFG)
            for kind, omega in (("guided", OMEGA), ("unguided", 0.0))
        )
        method = Method(steps=STEPS, gradient="extra", tiny=False)
        return Row(name=_A, make=guided.generate, unguided=plain.generate, method=method, size=1)

    def batched(title: str, **options: Any) -> Row:
        models = built(lambda: Large.build(name, learner))
        common = {"models": models, "steps": STEPS, "every": EVERY, "cfg_scale": CFG, **options}
        guided, plain = Batched(omega=OMEGA, **common), Batched(omega=0.0, **common)
        if guided.compile:
            plain._predict, plain._decode = guided._predict, guided._decode
        method = Method(steps=STEPS)
        return Row(
            name=title, make=guided.generate, unguided=plain.generate, method=method, size=batch
        )

    def ours(title: str, **options: Any) -> Row:
        pipeline = published(name, classes=CLASSES, dtype=DTYPE, device=device)
        if name != "dit-xl-2":
            pipeline.denoiser.model.to(memory_format=torch.channels_last)
        sampler = GuidedSampler(
            pipeline,
            learner,
            guidance=GuidanceConfig(omega=OMEGA, every=EVERY),
            steps=STEPS,
            cfg_scale=CFG,
            image_size=(224, 224),
            **options,
        )

        def unguided(labels: Tensor, ids: Tensor) -> Tensor:
            return sampler.generate(labels, ids, omega=0.0).images

        return Row(
            name=title,
            make=lambda labels, ids: sampler.generate(labels, ids).images,
            unguided=unguided,
            method=Method(steps=STEPS),
            size=batch,
            ours=True,
        )

    makers = {
        _A: predecessor,
        "(b) batched, eager": lambda: batched("(b) batched, eager"),
        "dpfast, eager": lambda: ours("dpfast, eager", compile=False, cuda_graphs=False),
        "dpfast, CUDA graphs": lambda: ours("dpfast, CUDA graphs", compile=False),
        "dpfast, compiled blocks and graphs": lambda: ours(
            "dpfast, compiled blocks and graphs", compile=True, compile_region="blocks"
        ),
        "dpfast, compiled and graphs": lambda: ours("dpfast, compiled and graphs", compile=True),
        "(c) torch.compile of (b)": lambda: batched("(c) torch.compile of (b)", compile=True),
    }
    if name != "dit-xl-2":
        del makers["dpfast, compiled blocks and graphs"]
    return {title: make for title, make in makers.items() if any(text in title for text in wanted)}


_A = "(a) the predecessor: batch 1, files"


def _seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(row: Row, parts: PartFlops, peak: float, rounds: int) -> Record:
    """Seconds of guided and unguided samples in turns, the first of each apart; memory of the
    guided ones.
    """
    labels, ids = (torch.arange(row.size, device="cuda") + start for start in (0, 1 << 41))
    calls = {"guided": lambda: row.make(labels, ids), "unguided": lambda: row.unguided(labels, ids)}
    first = {kind: _seconds(call) for kind, call in calls.items()}
    torch.cuda.reset_peak_memory_stats()
    seconds: dict[str, list[float]] = {"guided": [], "unguided": []}
    for _ in range(rounds):
        for kind, call in calls.items():
            seconds[kind].append(_seconds(call) / row.size)
    guided, unguided = (statistics.median(seconds[kind]) for kind in ("guided", "unguided"))
    flops = {"guided": row.method.total(parts), "unguided": row.method.unguided(parts)}
    return {
        "row": row.name,
        "batch": row.size,
        "samples_per_second": {"guided": 1 / guided, "unguided": 1 / unguided},
        "minimum_seconds": {kind: min(values) for kind, values in seconds.items()},
        "cost": guided / unguided,
        "cost_by_flops": row.method.ratio(parts),
        "flops": flops,
        "share_of_peak": {
            "guided": flops["guided"] / guided / peak,
            "unguided": flops["unguided"] / unguided / peak,
        },
        "first_seconds": first,
        "peak_bytes": torch.cuda.max_memory_reserved(),  # with the pool of captures
    }


def table(name: str, made: list[Record]) -> str:
    lines = [
        f"| {name} | samples/s | unguided | guided / unguided (by FLOPs) "
        "| over (b) | share of the peak | first batch, s | memory |",
        "|---" * 8 + "|",
    ]
    base = next(
        (
            record["samples_per_second"]["guided"]
            for record in made
            if record["row"].startswith("(b)")
        ),
        None,
    )
    for record in made:
        rate, share = record["samples_per_second"], record["share_of_peak"]
        lines.append(
            f"| {record['row']} | {rate['guided']:.2f} | {rate['unguided']:.2f} | "
            f"{record['cost']:.2f} "
            f"({record['cost_by_flops']:.2f}) | "
            f"{'' if base is None else format(rate['guided'] / base, '.2f') + 'x'} | "
            f"{share['guided']:.0%}, {share['unguided']:.0%} unguided | "
            f"{record['first_seconds']['guided']:.0f} | "
            f"{record['peak_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("models", __doc__)
    parser.add_argument(
        "--models", default="|".join(BATCHES), help=f"of {', '.join(BATCHES)}, | between several"
    )
    parser.add_argument(
        "--rows", default="", metavar="TEXT", help="the rows that contain TEXT, | between several"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=3, help="timed batches of each (default 3)"
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), help=f"samples at once (default {BATCHES})"
    )
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FOLDER",
        help="append to models.jsonl in FOLDER (default benchmarks/results)",
    )
    options = parser.parse_args(arguments)
    for name in options.models.split("|"):
        if name not in BATCHES:
            raise InputError(f"models = {name!r}: expected {' or '.join(BATCHES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a row fails. Raises ``InputError`` without a GPU."""
    options = _arguments(arguments)
    if not torch.cuda.is_available():
        raise InputError("the suite models needs a GPU, and torch sees none")
    peak, failed = here().half, False
    for name in options.models.split("|"):
        work, made = WORKS[name](), []
        with tempfile.TemporaryDirectory() as folder:
            makers = rows(
                name, options.batch_size or BATCHES[name], Path(folder), options.rows.split("|")
            )
            for title, make in makers.items():
                try:
                    made.append(measure(make(), work, peak, options.rounds))
                except Exception as error:  # a row that fails leaves the others
                    print(
                        f"{title}: {type(error).__name__}: {str(error)[:2000]}",
                        file=sys.stderr,
                        flush=True,
                    )
                    failed = True
                    continue
                finally:
                    gc.collect()
                    torch.cuda.empty_cache()
                print(json.dumps(made[-1]), file=sys.stderr, flush=True)
                if options.record is not None:
                    record = {"peak": peak, "model": name} | made[-1]
                    timing.append(options.record / RECORDS.name, "models", [record], "cuda")
        print(table(name, made), flush=True)
    return 1 if failed else 0
