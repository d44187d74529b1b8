"""Guided sampling at the sizes that people use, measured: `dpfast bench models`, on a GPU.

DiT-XL/2 at 256 px and Stable Diffusion 1.5 at 512 px, and with --models 2.1 at 768 px and XL at
1024 px, in bf16, guided by ViT-B/16 at 224 px in every fifth of 20 DDIM steps through the tiny
decoder. Weights are random, which changes neither FLOPs nor bytes. All rows make the same number of
samples from labels to uint8 images on the device, and (a) to files; their rivals are those of
`benchmarks.systems.naive`, and (b2), which is (b) with cuDNN's search, the tiny decoder in NHWC,
and UNet and full decoder in the layout that is faster. "unfused" are diffusers' own modules;
records of before say nothing in its place.

With --tiny the same rows run at sizes that a CPU computes in seconds, to try the code out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

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
from benchmarks.systems.naive import Batched, Models, Predecessor
from dpfast.cli.parser import at_least
from dpfast.errors import InputError
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.models.decoder import decoder_dtype
from dpfast.generate.models.fused import quantise
from dpfast.generate.pipelines import Pipeline
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware.device import searched_convolutions
from dpfast.hardware.peaks import here
from dpfast.learn.models import build_learner
from dpfast.planning.architectures import (
    ARCHITECTURES,
    META,
    PIXELS,
    Published,
    default_dtype,
    frozen,
    over_betas,
    published,
)
from dpfast.planning.methods import Method, PartFlops, parts_of

RECORDS = RESULTS / "models.jsonl"
EVERY = 5
OMEGA = 0.03
CFG = 1.5
DTYPE = torch.bfloat16
LEAST_ROUNDS = 7  # of (a), whose calls vary most; with fewer it is compared by minima
FIRST_ID = 1 << 41  # ids that no run uses
Make = Callable[[Tensor, Tensor], Any]
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A generator and its learner. batch: samples at once; changes: as `published` takes them;
    learner: options of the ViT, whose images have `side` pixels.
    """

    name: str
    batch: int
    pixels: int
    steps: int = 20
    classes: int = 1000
    side: int = 224
    learner: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def about(self) -> Published:
        return ARCHITECTURES[self.name]

    @property
    def is_dit(self) -> bool:
        return self.name == "dit-xl-2"

    def config(self, part: str) -> dict[str, Any]:
        """The configuration of the "denoiser", "vae" or "tiny"."""
        about = self.about
        before = {"denoiser": about.config, "vae": about.vae, "tiny": about.tiny or {}}
        return before[part] | self.changes.get(part, {})

    def pipeline(self, device: torch.device, dtype: torch.dtype, *, fused: bool) -> Pipeline:
        """With the weights that `Large.build` makes, which draws them in the same order."""
        torch.manual_seed(0)
        return published(
            self.name,
            self.pixels,
            classes=self.classes,
            dtype=dtype,
            device=device,
            fused=fused,
            changes=self.changes,
        )

    def classifier(self) -> nn.Module:
        """The learner with weights at random, on the device of the context, in its dtype."""
        kind = "transformers:ViTForImageClassification"
        return frozen(build_learner(kind, classes=self.classes, channels=3, **self.learner))

    def work(self) -> PartFlops:
        with META:
            learner = self.classifier()
        pipeline = self.pipeline(META, torch.float32, fused=False)
        return parts_of(self.name, pipeline, learner, self.side)


_NARROW = {
    "vae": {"block_out_channels": (32,) * 4, "layers_per_block": 1},
    "tiny": {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
}
_TINY: dict[str, Any] = {
    "batch": 2,
    "pixels": 32,
    "steps": 6,
    "classes": 10,
    "side": 32,
    "learner": {
        "image_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 2,  # one alone does not repeat
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
}
SETTINGS = {
    name: Setting(name=name, batch=batch, pixels=PIXELS[name])
    for name, batch in (
        ("dit-xl-2", 32),
        ("stable-diffusion-1.5", 16),
        ("stable-diffusion-2.1", 8),
        ("stable-diffusion-xl", 4),
    )
}
USUAL = ("dit-xl-2", "stable-diffusion-1.5")  # those of the records
_NARROW_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
}
TINY = {
    "dit-xl-2": Setting(
        name="dit-xl-2",
        changes={
            "denoiser": {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "num_embeds_ada_norm": 10,
            },
            **_NARROW,
        },
        **_TINY,
    ),
    "stable-diffusion-1.5": Setting(
        name="stable-diffusion-1.5",
        changes={
            "denoiser": {**_NARROW_UNET, "attention_head_dim": 2},
            **_NARROW,
        },
        **_TINY,
    ),
    "stable-diffusion-2.1": Setting(
        name="stable-diffusion-2.1",
        changes={
            "denoiser": {**_NARROW_UNET, "attention_head_dim": (2, 4)},
            **_NARROW,
        },
        **_TINY,
    ),
    "stable-diffusion-xl": Setting(
        name="stable-diffusion-xl",
        changes={
            "denoiser": {
                **_NARROW_UNET,
                "attention_head_dim": (2, 4),
                "transformer_layers_per_block": (1, 2),
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 40,
            },
            **_NARROW,
        },
        **_TINY,
    ),
}


class Learner(nn.Module):
    """The learner, which takes images of any dtype in its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(next(self.model.parameters()).dtype))


class Resized(nn.Module):
    """What plain code puts before a learner of one image size."""

    def __init__(self, learner: nn.Module, size: int) -> None:
        super().__init__()
        self.learner, self.size = learner, (size, size)

    def forward(self, images: Tensor) -> Tensor:
        return self.learner(
            nn.functional.interpolate(images, self.size, mode="bilinear", antialias=True)
        )


@dataclass(frozen=True)
class Large(Models):
    """Diffusers' own modules of a published architecture; latents in fp32, networks in `dtype`."""

    classes: int = 1000
    prompts: Tensor | None = None
    dtype: torch.dtype = DTYPE
    added: Tensor | None = None  # what a prompt of XL adds to the embedding of the time

    @classmethod
    def build(cls, setting: Setting, learner: nn.Module, dtype: torch.dtype = DTYPE) -> Large:
        """On the device of the context, with weights that are drawn in its dtype and then cast."""
        about, drawn = setting.about, torch.get_default_dtype()
        side, config = setting.pixels // about.scale, setting.config("denoiser")
        if setting.is_dit:
            network, prompts = diffusers.DiTTransformer2DModel(sample_size=side, **config), None
        else:
            network = diffusers.UNet2DConditionModel(sample_size=side, **config).to(
                memory_format=torch.channels_last
            )
            prompts = torch.randn(setting.classes + 1, 77, config["cross_attention_dim"]).to(dtype)
        of_vae = setting.config("vae")
        with default_dtype(decoder_dtype(of_vae, drawn)):
            vae = diffusers.AutoencoderKL(**of_vae)
        tiny = diffusers.AutoencoderTiny(**setting.config("tiny"))
        added = None
        if config.get("addition_embed_type") is not None:
            added = torch.randn(setting.classes + 1, network.time_embedding.linear_2.out_features)
            added = added.to(dtype)
            network.get_aug_embed = lambda *, added_cond_kwargs, **_: added_cond_kwargs["rows"]
        networks = [frozen(each) for each in (network, vae, tiny)]
        if dtype != drawn:
            networks = [each.to(dtype) for each in networks]
        resized = Resized(learner, setting.side)
        scheduler = over_betas(about)
        return cls(*networks, scheduler, resized, setting.classes, prompts, dtype, added)

    def predict(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        steps = t.to(x.device).expand(len(x))
        if self.prompts is None:
            out = self.transformer(x.to(self.dtype), timestep=steps, class_labels=labels).sample
        else:
            rows = None if self.added is None else {"rows": self.added[labels]}
            out = self.transformer(
                x.to(self.dtype),
                steps,
                encoder_hidden_states=self.prompts[labels],
                added_cond_kwargs=rows,
            ).sample
        return out[:, : x.shape[1]].float()

    def null(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.classes)

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self.vae.config.scaling_factor
        return self.vae.decode(scaled.to(self.vae.dtype)).sample.float()

    def decode_tiny(self, latents: Tensor) -> Tensor:
        return self.tiny.decode(latents.to(self.dtype)).sample.float()

    @torch.no_grad()
    def in_faster_layouts(self, batch: int) -> dict[str, str]:
        """Puts the tiny decoder into NHWC, and UNet and full decoder each into the layout in which
        a batch takes less time here; returns which.
        """
        config = self.transformer.config
        device = next(self.vae.parameters()).device
        shape = (2 * batch, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, device=device)
        labels = torch.zeros(2 * batch, dtype=torch.int64, device=device)
        calls = {"vae": (self.vae, lambda: self.decode(x[:batch]))}
        if self.prompts is not None:
            unet = self.transformer, lambda: self.predict(x, torch.tensor(500), labels)
            calls = {"unet": unet, **calls}
        self.tiny.to(memory_format=torch.channels_last)
        layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
        chosen = {}
        for name, (network, call) in calls.items():
            seconds = {}
            for layout, memory_format in layouts.items():
                network.to(memory_format=memory_format)
                call()  # cuDNN searches
                seconds[layout] = min(_seconds(call, device) for _ in range(2))
            chosen[name] = min(seconds, key=seconds.__getitem__)
            network.to(memory_format=layouts[chosen[name]])
        return chosen


@dataclass(kw_only=True)
class Row:
    """One way to make guided samples: (labels, ids) to uint8 images, or to files. size: samples of
    a call; notes: what its record tells beside the measurements.
    """

    name: str
    make: Make
    unguided: Make
    method: Method
    size: int
    notes: Record = field(default_factory=dict)


class Bench:
    """A setting's learner on a device, and the ways to sample with it."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        self.setting, self.device = setting, device

    @functools.cached_property
    def learner(self) -> nn.Module:
        return frozen(Learner(self._built(self.setting.classifier)))

    def _built(self, make: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with self.device:
                return make()
        finally:
            torch.set_default_dtype(before)

    def models(self, dtype: torch.dtype = DTYPE) -> Large:
        """Diffusers' modules, and the learner, with the weights of bf16 in any dtype."""
        learner = self.learner if dtype == DTYPE else copy.deepcopy(self.learner).to(dtype)
        return self._built(lambda: Large.build(self.setting, learner, dtype))

    def batched(self, models: Models, **options: Any) -> Batched:
        common = {"steps": self.setting.steps, "every": EVERY, "omega": OMEGA, "cfg_scale": CFG}
        return Batched(models=models, **common | options)

    def sampler(
        self,
        *,
        fused: bool = False,
        fused_decoders: bool = False,
        float8: bool = False,
        **options: Any,
    ) -> GuidedSampler:
        setting = self.setting
        pipeline = setting.pipeline(self.device, DTYPE, fused=fused)
        if not fused and not setting.is_dit:
            pipeline.denoiser.model.to(memory_format=torch.channels_last)
        if float8:
            quantise(pipeline.denoiser.model)
        if fused_decoders:
            other = setting.pipeline(self.device, DTYPE, fused=True)
            pipeline = replace(
                pipeline, decoder=other.decoder, guidance_decoder=other.guidance_decoder
            )
        return GuidedSampler(
            pipeline,
            self.learner,
            guidance=GuidanceConfig(omega=OMEGA, every=EVERY),
            steps=setting.steps,
            cfg_scale=CFG,
            image_size=(setting.side, setting.side),
            **options,
        )

    def method(self, **options: Any) -> Method:
        steps = self.setting.steps
        return Method(steps=steps, guided=-(-steps // EVERY), **options)

    def predecessor(self, folder: Path) -> Row:
        models, steps = self.models(), self.setting.steps
        guided, plain = (
            Predecessor(models, folder / kind, steps=steps, every=EVERY, omega=omega, cfg_scale=CFG)
            for kind, omega in (("guided", OMEGA), ("unguided", 0.0))
        )
        method = self.method(gradient="extra", tiny=False)
        return Row(name=_A, make=guided.write, unguided=plain.write, method=method, size=1)

    def plain(self, title: str, *, better: bool = False, **options: Any) -> Row:
        """(b), or where `better` (b2)."""
        models = self.models()
        notes = {"layouts": models.in_faster_layouts(self.setting.batch)} if better else {}
        guided = self.batched(models, **options)
        plain = self.batched(models, **options | {"omega": 0.0})
        if guided.compile:
            plain._predict, plain._decode = guided._predict, guided._decode
        return Row(
            name=title,
            make=guided.generate,
            unguided=plain.generate,
            method=self.method(),
            size=self.setting.batch,
            notes=notes,
        )

    def ours(self, title: str, *, batches: int = 1, **options: Any) -> Row:
        sampler = self.sampler(**options)
        return Row(
            name=title,
            make=lambda labels, ids: sampler.generate(labels, ids).images,
            unguided=lambda labels, ids: sampler.generate(labels, ids, omega=0.0).images,
            method=self.method(),
            size=batches * self.setting.batch,
        )

    def rows(self, folder: Path, wanted: str) -> dict[str, Callable[[], Row]]:
        """Makers of the rows, so that only one at a time holds its memory."""
        graphs = self.device.type == "cuda"
        blocks = {"compile": True, "compile_region": "blocks", "cuda_graphs": graphs}
        fused = {"fused": True, "compile": False}
        captured = {**fused, "cuda_graphs": graphs}
        ours: dict[str, dict[str, Any]] = {
            "dpfast, fused, eager": {**fused, "cuda_graphs": False},
            "dpfast, fused, CUDA graphs": captured,
            "dpfast, fused, float8, CUDA graphs": {**captured, "float8": True},
            "dpfast, fused, CUDA graphs, twice the batch": {**captured, "batches": 2},
            # fused blocks stay as they are where the blocks are compiled
            "dpfast, fused, compiled learner and graphs": {**blocks, "fused": True},
            "dpfast, unfused, eager": {"compile": False, "cuda_graphs": False},
            "dpfast, unfused, CUDA graphs": {"compile": False, "cuda_graphs": graphs},
            "dpfast, unfused, compiled blocks and graphs": blocks,
            "dpfast, unfused, compiled blocks and graphs, fused decoders": {
                **blocks,
                "fused_decoders": True,
            },
            "dpfast, unfused, compiled and graphs": {"compile": True, "cuda_graphs": graphs},
        }
        if not self.setting.is_dit:
            del ours["dpfast, fused, float8, CUDA graphs"]
        makers: dict[str, Callable[[], Row]] = {
            title: lambda title=title, given=given: self.ours(title, **given)  # type: ignore[misc]
            for title, given in ours.items()
        }
        b, b2, c = (
            "(b) batched, eager",
            "(b2) batched, better layout and search",
            "(c) torch.compile of (b)",
        )
        makers |= {
            _A: lambda: self.predecessor(folder),
            b: lambda: self.plain(b),
            b2: lambda: self.plain(b2, better=True),
            c: lambda: self.plain(c, compile=True),
        }
        # where the time is cut, the first ones are there
        first = [_A, b, "dpfast, fused, eager", "dpfast, fused, CUDA graphs", b2]
        makers = {title: makers[title] for title in dict.fromkeys([*first, *makers])}
        return {title: make for title, make in makers.items() if is_wanted(title, wanted)}


_A = "(a) the predecessor: batch 1, files"
_DEFAULTS = ("(a)", "(b) ", "(c)")  # rows that leave cuDNN as torch has it


@contextlib.contextmanager
def convolutions(
    device: torch.device, *, searched: bool, tf32: bool | None = None
) -> Iterator[None]:
    """Lets cuDNN search, or not, for rows in one process. tf32: None: whatever keeps them apart.

    torch keeps what it chose for a convolution by shape, thread and TF32 (which means nothing in
    bf16), whether it searched or not: here rows that search and rows that do not differ in TF32,
    and so neither gets what the other chose.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = not searched if tf32 is None else tf32
    try:
        with searched_convolutions(device, static=searched):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    timing.synchronise(device)
    start = time.perf_counter()
    call()
    timing.synchronise(device)
    return time.perf_counter() - start


def measure(row: Row, parts: PartFlops, peak: float, rounds: int, device: torch.device) -> Record:
    """Seconds of guided and unguided samples in turns, the first of each apart; memory of the
    guided ones, on a GPU.
    """
    if row.name == _A:
        rounds = max(rounds, LEAST_ROUNDS)
    ids = torch.arange(row.size, device=device)
    labels, ids = ids % 10, ids + FIRST_ID
    calls = {"guided": lambda: row.make(labels, ids), "unguided": lambda: row.unguided(labels, ids)}
    first = {kind: _seconds(call, device) for kind, call in calls.items()}
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds: dict[str, list[float]] = {"guided": [], "unguided": []}
    for _ in range(rounds):
        for kind, call in calls.items():
            seconds[kind].append(_seconds(call, device) / row.size)
    guided, unguided = (statistics.median(seconds[kind]) for kind in ("guided", "unguided"))
    flops = {"guided": row.method.total(parts), "unguided": row.method.unguided(parts)}
    return {
        "row": row.name,
        "batch": row.size,
        "rounds": rounds,
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
        # with the pool of captures
        "peak_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        **row.notes,
    }


def heading(name: str) -> str:
    return (
        f"| {name} | samples/s | unguided | guided / unguided (by FLOPs) "
        "| over (a) | over (b) | share of the peak | first batch, s | memory |\n" + "|---" * 9 + "|"
    )


def over(record: Record, base: Record) -> float:
    """How many guided samples a row makes in the time of one of another row: by medians, or by
    minima where that one was timed too seldom for a median.
    """
    if base["row"] == _A and base.get("rounds", 0) < LEAST_ROUNDS:
        return base["minimum_seconds"]["guided"] / record["minimum_seconds"]["guided"]
    return record["samples_per_second"]["guided"] / base["samples_per_second"]["guided"]


def line(record: Record, made: list[Record]) -> str:
    """A row of the table, beside (a) and (b) where they are among those that are `made`."""
    rate, share, peak = (
        record[key] for key in ("samples_per_second", "share_of_peak", "peak_bytes")
    )
    cells = [
        record["row"],
        f"{rate['guided']:.3g}",
        f"{rate['unguided']:.3g}",
        f"{record['cost']:.2f} ({record['cost_by_flops']:.2f})",
    ]
    for letter, digits in (("(a)", 1), ("(b)", 2)):
        base = [other for other in made if other["row"].startswith(letter)]
        cells.append(f"{over(record, base[0]):.{digits}f}x" if base else "")
    cells += [
        f"{share['guided']:.0%}, {share['unguided']:.0%} unguided",
        f"{record['first_seconds']['guided']:.0f}",
        "" if peak is None else f"{peak / 1e9:.1f} GB",
    ]
    return f"| {' | '.join(cells)} |"


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("models", __doc__)
    add_settings(parser)
    add_rows(parser)
    parser.add_argument(
        "--rounds",
        type=at_least(1),
        default=3,
        help=f"timed batches of each, {LEAST_ROUNDS} or more of (a) (default 3)",
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), help="samples at once (default 32, 16, 8 and 4)"
    )
    add_record(parser, "models")
    return parser.parse_args(arguments)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """``--models``, ``--device`` and ``--tiny``, which `settings` reads."""
    parser.add_argument(
        "--models",
        default="|".join(USUAL),
        help=f"of {', '.join(SETTINGS)}, | between several (default: {' and '.join(USUAL)})",
    )
    add_device(parser)
    parser.add_argument(
        "--tiny", action="store_true", help="of sizes that a CPU computes in seconds"
    )


def settings(suite: str, options: argparse.Namespace) -> list[Setting]:
    """Those that are asked for. Raises ``InputError`` for others, and without a GPU for published
    sizes.
    """
    names = options.models.split("|")
    for name in names:
        if name not in SETTINGS:
            raise InputError(f"models = {name!r}: expected {' or '.join(SETTINGS)}")
    if options.device.type != "cuda" and not options.tiny:
        raise InputError(
            f"device = {str(options.device)!r}: the suite {suite} needs a GPU; expected cuda, or "
            "--tiny"
        )
    return [(TINY if options.tiny else SETTINGS)[name] for name in names]


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a row fails. Raises ``InputError`` for published sizes without a GPU."""
    options = _arguments(arguments)
    chosen, device = settings("models", options), options.device
    # nothing is made until a row is asked for
    names = [name for each in chosen for name in Bench(each, device).rows(Path(), "")]
    check_rows(dict.fromkeys(names), options.rows)
    peak, failed = here().half, False
    for setting in chosen:
        setting = replace(setting, batch=options.batch_size or setting.batch)
        work, made = setting.work(), []
        bench = Bench(setting, device)
        print(heading(setting.name), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for title, make in bench.rows(Path(folder), options.rows).items():
                try:
                    with convolutions(device, searched=not title.startswith(_DEFAULTS)):
                        made.append(measure(make(), work, peak, options.rounds, device))
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
                print(line(made[-1], made), flush=True)
                print(json.dumps(made[-1]), file=sys.stderr, flush=True)
                if options.record is not None:
                    record = {"peak": peak, "model": setting.name} | made[-1]
                    timing.append(options.record / RECORDS.name, "models", [record], device)
    return 1 if failed else 0
