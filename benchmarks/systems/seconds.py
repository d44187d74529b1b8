"""Seconds of guided batches on an H200, derived of counted kernels: `dpfast bench seconds`.

What `dpfast.hardware.traffic` counts, each kernel at a rate of its kind, makes the milliseconds
of a step, of what guidance adds to it and of a decoding; steps and decoding make a batch. The rates
are those of ``RATES``: two are measured here, the others taken from what others published or
assumed, and one, ``share``, is fitted to the batches of plain modules that an H200 has timed. The
first table holds the derived seconds against those, and against compiled blocks, which nothing was
fitted to; the second says what fused blocks and float8 make of them, which no GPU has timed. What
the host takes to launch is counted nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.harness.arguments import new_parser
from benchmarks.systems.models import DTYPE, EVERY, SETTINGS, USUAL, Bench, Resized, Setting
from benchmarks.systems.traffic import with_gradient, without_tape
from dpfast.generate.models.fused import quantise
from dpfast.generate.resizing import by_products
from dpfast.hardware.traffic import Kernel, Traffic
from dpfast.planning.architectures import META
from dpfast.planning.methods import Method
from dpfast.terminal import say
from dpfast.textfiles import read_json_lines

GPU = "NVIDIA H200"
UNITS = 132  # multiprocessors, each with one tile of a product's result at a time
# a tile's rows and columns -> what of the rate it reaches: a small one reads its operands again
TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.92, (256, 64): 0.8, (128, 64): 0.75}
# rows that were timed -> their networks, of diffusers' modules as they are or compiled; the first
# records do not say "unfused"
TIMED = {
    "(b) batched, eager": "(b)",
    "dpfast, eager": "plain",
    "dpfast, unfused, eager": "plain",
    "dpfast, compiled blocks and graphs": "compiled blocks",
    "dpfast, unfused, compiled blocks and graphs": "compiled blocks",
}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a GPU does of each kind of kernel: FLOP/s of products, bytes/s of all else.

    half, float8: large products; depth, float8_depth: a product's sums of as many terms reach
    half of it. share: of this, what products of these networks get. attention: by lanes, the head
    sizes that exist in hardware; backward: of its rate. own, torch: shares of ``copy`` that our
    one-pass kernels and torch's elementwise ones reach. launch: seconds of each kernel beside.
    """

    # measured here: docs/records/results.md, "On a GPU"
    half: float = 780e12
    copy: float = 4.15e12
    # 394 TFLOP/s at sums of 256 terms: openxla/xla, matmul_interpolator_data.h, sm_90
    depth: int = 256
    # torch._scaled_mm by rows, 858, 1129 and 1343 TFLOP/s at 512, 1024 and 2048 terms on an H800:
    # figures in pull request 34318 of sgl-project/sglang; this line goes through them to 1 %
    float8: float = 1650e12
    float8_depth: int = 472
    share: float = 0.9  # fitted
    # FlashAttention 2 and cuDNN at heads of 64 and 128: Shah et al. 2024, "FlashAttention-3",
    # figure 5; beyond, assumed
    attention: tuple[tuple[int, float], ...] = (
        (64, 321e12),
        (128, 368e12),
        (256, 350e12),
        (512, 100e12),
    )
    backward: float = 0.8  # assumed
    attention_bytes: float = 0.7  # of copy, assumed
    own: float = 0.85  # assumed; measured 0.79 to 0.99 of four kernels that are not these
    torch: float = 0.75  # assumed
    # torch's copy between NCHW and NHWC; 0.5 TB/s were seen elsewhere (issue 113560 of PyTorch)
    layout: float = 0.8e12
    cudnn_layout: float = 2.1e12  # assumed
    bias: float = 1.5e12  # of a convolution, in NHWC: pull request 38650 of sgl-project/sglang
    sums: float = 0.45  # of copy, those of torch's group norm, assumed
    resize: float = 0.1  # of copy, torch's resize free of aliases, assumed
    launch: float = 2e-6  # assumed

    def seconds(self, kernel: Kernel) -> float:
        """Seconds of one kernel."""
        if kernel.kind != "product":
            return self.launch + kernel.bytes / self._stream(kernel)
        if "attention" in kernel.name:
            lanes, rate = next(row for row in self.attention if kernel.depth <= row[0])
            if "backward" in kernel.name:
                rate *= self.backward
            work = kernel.flops * lanes / kernel.depth / rate
            return self.launch + max(work, kernel.bytes / (self.attention_bytes * self.copy))
        peak, depth = self.half, self.depth
        if kernel.name == "_scaled_mm":
            peak, depth = self.float8, self.float8_depth
        rate = peak * self.share * filled(kernel) * kernel.depth / (kernel.depth + depth)
        return self.launch + max(kernel.flops / rate, kernel.bytes / (self.own * self.copy))

    def _stream(self, kernel: Kernel) -> float:
        """bytes/s of what is no product."""
        if kernel.kind == "layout":
            return self.cudnn_layout if "cuDNN" in kernel.name else self.layout
        if kernel.name == "convolution, bias":
            return self.bias
        shares = {"group_norm, sums": self.sums, "_upsample_bilinear2d_aa": self.resize}
        share = self.own if kernel.own else self.torch
        return self.copy * shares.get(kernel.name, share)


RATES = Rates()
# cuDNN's attention, which `dpfast.generate.models.attention` asks for at heads of up to 128
CUDNN = replace(RATES, attention=((64, 408e12), (128, 609e12), *RATES.attention[2:]))


def filled(kernel: Kernel) -> float:
    """What of the multiprocessors' time a product's tiles fill, the last round of them included, in
    the best of the ``TILES``.
    """
    shape = kernel.shape
    if "conv" in kernel.name:
        shape = (math.prod(shape) // shape[1], shape[1])
    *several, rows, columns = shape
    each, best = math.prod(several), 0.0
    for (height, width), rate in TILES.items():
        tiles = each * math.ceil(rows / height) * math.ceil(columns / width)
        rounds = math.ceil(tiles / UNITS)
        best = max(best, rate * each * rows * columns / (rounds * UNITS * height * width))
    return best


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The parts of a batch, counted: ``step`` of all rows, conditional and not, ``half`` of one of
    these; ``prediction``, ``tiny`` and ``learner`` with their gradients; decoding.
    """

    step: Traffic
    half: Traffic
    prediction: Traffic
    tiny: Traffic
    learner: Traffic
    decoder: Traffic


@dataclass(frozen=True)
class Seconds:
    """Of a step; of what guidance adds to one, which are two forward passes of ``halves`` in the
    place of one, the denoiser's ``gradient``, and both passes of tiny decoder and learner; and of
    the decoding of a batch.
    """

    step: float
    halves: float
    gradient: float
    tiny: float
    learner: float
    decoder: float
    steps: int
    guided_steps: int

    @classmethod
    def of(cls, batch: Batch, setting: Setting, rates: Rates = RATES) -> Seconds:
        part = {
            name: sum(map(rates.seconds, traffic.kernels)) for name, traffic in vars(batch).items()
        }
        return cls(
            step=part["step"],
            halves=2 * part["half"] - part["step"],
            gradient=part["prediction"] - part["half"],
            tiny=part["tiny"],
            learner=part["learner"],
            decoder=part["decoder"],
            steps=setting.steps,
            guided_steps=guided_steps(setting),
        )

    @property
    def guidance(self) -> float:
        return self.halves + self.gradient + self.tiny + self.learner

    @property
    def unguided(self) -> float:
        return self.steps * self.step + self.decoder

    @property
    def guided(self) -> float:
        return self.unguided + self.guided_steps * self.guidance


def batch(setting: Setting, form: str) -> Batch:
    """The parts of a batch, of diffusers' modules called by plain code ("(b)") or by dpfast
    ("plain"), of fused blocks ("fused") and with their linear layers in float8 ("float8").
    """
    bench = Bench(setting, META)
    side = (setting.side, setting.side)
    predict: Callable[..., Tensor]
    look: Any = Resized(bench.learner, setting.side)
    if form == "(b)":
        models = bench.models()
        predict, decode, tiny = models.predict, models.decode, models.decode_tiny
    else:
        fused = form != "plain"
        pipeline = setting.pipeline(META, DTYPE, fused=fused)
        predict, decode, tiny = pipeline.denoiser, pipeline.decoder, pipeline.guidance_decoder
        model: Any = pipeline.denoiser.model  # type: ignore[attr-defined]
        if not fused and not setting.is_dit:
            model.to(memory_format=torch.channels_last)
        if form == "float8":
            quantise(model)
        if fused:

            def look(images: Tensor) -> Tensor:
                return bench.learner(by_products(images, side))

    size, pixels = setting.batch, setting.pixels
    with META:
        x = torch.empty(2 * size, 4, pixels // 8, pixels // 8)
        labels = torch.zeros(2 * size, dtype=torch.int64)
        timestep = torch.empty((), dtype=torch.int64)
        images = torch.empty(size, 3, pixels, pixels)
    return Batch(
        step=without_tape(predict, x, timestep, labels),
        half=without_tape(predict, x[:size], timestep, labels[:size]),
        prediction=with_gradient(predict, x[:size], timestep, labels[:size]),
        tiny=with_gradient(tiny, x[:size]),
        learner=with_gradient(look, images),
        decoder=without_tape(decode, x[:size]),
    )


def timed(name: str) -> dict[str, dict[str, float]]:
    """The seconds of a guided and an unguided batch of a model that were recorded on the GPU of the
    rates, by form.
    """
    found = {}
    for _, record in read_json_lines(RESULTS / "models.jsonl"):
        form = TIMED.get(record["row"])
        if form and record["model"] == name and record.get("gpu") == GPU:
            rates = record["samples_per_second"]
            found[form] = {kind: record["batch"] / rates[kind] for kind in ("guided", "unguided")}
    return found


def in_compiled_blocks(parts: Batch, setting: Setting) -> float:
    """Seconds of an unguided batch of plain modules whose blocks Inductor has compiled: what
    `dpfast bench inductor_blocks` counted of one block without its products, times the blocks.
    """
    records = (record for _, record in read_json_lines(RESULTS / "inductor_blocks.jsonl"))
    block = next(r for r in records if r["block"] == "DiT-XL/2" and not r["taped"])
    assert block["rows"] == 2 * setting.batch
    before, after = block["plain, eager"], block["plain, Inductor"]
    launches = before["launches"] - after["launches"]
    moved = before["bytes"] / RATES.torch - after["bytes"] / RATES.own
    saved = launches * RATES.launch + moved / RATES.copy
    blocks = setting.config("denoiser")["num_layers"]
    return Seconds.of(parts, setting).unguided - setting.steps * blocks * saved


def check(counted: dict[tuple[str, str], Batch]) -> str:
    """Markdown: the recorded seconds of batches beside the derived ones."""
    lines = [
        "| seconds of a batch | guided | derived | | unguided | derived | |",
        "|---" * 7 + "|",
    ]
    for name in USUAL:
        setting = SETTINGS[name]
        for form, measured in timed(name).items():
            derived: dict[str, float] = {}
            if form == "compiled blocks":  # whose guided steps ran each block twice when timed
                plain = counted[name, "plain"]
                derived["unguided"] = in_compiled_blocks(plain, setting)
            else:
                seconds = Seconds.of(counted[name, form], setting)
                derived |= {"guided": seconds.guided, "unguided": seconds.unguided}
            cells = [f"{name}, {form}, batch {setting.batch}"]
            for kind, each in measured.items():
                mine = derived.get(kind)
                told = ["", ""] if mine is None else [f"{mine:.3f}", f"{mine / each - 1:+.0%}"]
                cells += [f"{each:.3f}", *told]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(counted: dict[tuple[str, str], Batch]) -> str:
    """Markdown: the parts of batches and what they make, by form, and over (b) as it was timed."""
    rows: dict[str, list[str]] = {}

    def put(row: str, cell: str) -> None:
        rows.setdefault(row, []).append(cell)

    heads = []
    for (name, form), parts in counted.items():
        setting = SETTINGS[name]
        work = batch_flops(setting)
        heads.append(f"{name}, {form}")
        made = Seconds.of(parts, setting)
        put("step, ms", f"{made.step * 1e3:.1f}")
        for kind, seconds in kinds(parts.step).items():
            put(f"of it {kind}", f"{seconds * 1e3:.1f}")
        put("guidance adds to a step, ms", f"{made.guidance * 1e3:.1f}")
        put("of it two halves of a step", f"{made.halves * 1e3:.1f}")
        put("of it the denoiser's gradient", f"{made.gradient * 1e3:.1f}")
        put("of it tiny decoder, both passes", f"{made.tiny * 1e3:.1f}")
        put("of it learner, both passes", f"{made.learner * 1e3:.1f}")
        put("decoding, ms", f"{made.decoder * 1e3:.0f}")
        put("unguided batch, s", f"{made.unguided:.3f}")
        put("guided batch, s", f"{made.guided:.3f}")
        put("guided over unguided", f"{made.guided / made.unguided:.2f}")
        for rates, told in ((RATES, ""), (CUDNN, ", attention by cuDNN")):
            mine = Seconds.of(parts, setting, rates).guided
            put(f"samples over (b){told}", f"{timed(name)['(b)']['guided'] / mine:.2f}x")
            plain = Seconds.of(counted[name, "(b)"], setting, rates).guided
            put(f"samples over a derived (b){told}", f"{plain / mine:.2f}x")
            put(f"share of products' rate{told}", f"{work / mine / rates.half:.0%}")
    lines = [f"| derived | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    return "\n".join([*lines, *(f"| {row} | {' | '.join(cells)} |" for row, cells in rows.items())])


def kinds(traffic: Traffic, rates: Rates = RATES) -> dict[str, float]:
    """The seconds of a call by kind of kernel."""
    total = dict.fromkeys(("products", "attention", "layout copies", "all else"), 0.0)
    words = {"product": "products", "layout": "layout copies", "pointwise": "all else"}
    for kernel in traffic.kernels:
        kind = "attention" if "attention" in kernel.name else words[kernel.kind]
        total[kind] += rates.seconds(kernel)
    return total


def guided_steps(setting: Setting) -> int:
    return -(-setting.steps // EVERY)


def batch_flops(setting: Setting) -> float:
    """FLOPs of a guided batch, as `dpfast bench models` counts them."""
    return (
        Method(steps=setting.steps, guided=guided_steps(setting)).total(setting.work())
        * setting.batch
    )


def counted_batches() -> dict[tuple[str, str], Batch]:
    """Of each setting, by its name and its form."""
    found = {}
    for name in USUAL:
        setting = SETTINGS[name]
        for form in ("(b)", "plain", "fused", *(["float8"] if setting.is_dit else [])):
            found[name, form] = batch(setting, form)
    return found


def main(arguments: list[str] | None = None) -> int:
    new_parser("seconds", __doc__).parse_args(arguments)
    counted = counted_batches()
    say(f"{check(counted)}\n\n{table(counted)}")
    return 0
