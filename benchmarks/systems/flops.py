"""The FLOPs of guided samples, derived on meta tensors: `dpfast bench flops`.

Published models at the sizes that people use, or one of yours by `--pipeline FOLDER`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from benchmarks.harness.arguments import new_parser
from dpfast.config import Generator
from dpfast.errors import InputError
from dpfast.hardware.peaks import samples_per_second
from dpfast.planning.architectures import pipeline_of
from dpfast.planning.methods import (
    PREDECESSOR,
    Method,
    PartFlops,
    beside_vit,
    dit_xl_2,
    flux,
    pixart_sigma,
    sana,
    stable_diffusion_15,
    stable_diffusion_21,
    stable_diffusion_xl,
)
from dpfast.terminal import say

METHODS = {
    "the predecessor, batched or not": PREDECESSOR,
    "+ shared conditional forward": Method(tiny=False),
    "+ tiny decoder": Method(),
    "    the same, guided in every step": Method(guided=20),
    "    the same, gradient not through the denoiser (approximate)": Method(gradient="latent"),
    "    the same, CFG until 80%": Method(cfg_steps=16),
    "+ DPM-Solver++ 2M, 8 steps": Method(steps=8),
}


def table() -> str:
    """Markdown: FLOPs of a guided sample, its cost against an unguided one, and its gain on the
    predecessor.
    """
    generators = [
        stable_diffusion_15(512),
        stable_diffusion_15(256),
        stable_diffusion_21(),
        stable_diffusion_xl(),
        dit_xl_2(),
    ]
    lines = [
        "| | " + " | ".join(parts.name for parts in generators) + " |",
        "|---" * (len(generators) + 1) + "|",
    ]
    for name, method in METHODS.items():
        cells = [
            f"{method.total(parts) / 1e12:.2f} TFLOP, {method.ratio(parts):.2f}x unguided, "
            f"{PREDECESSOR.total(parts) / method.total(parts):.2f}x"
            for parts in generators
        ]
        lines.append(f"| {name.replace('    ', '&nbsp;&nbsp;')} | " + " | ".join(cells) + " |")
    bound = [
        f"{samples_per_second('H100', Method().total(parts), share=0.5):.1f}"
        for parts in generators
    ]
    lines.append(
        "| limit of an H100 at half its peak, 20 steps, samples/s | " + " | ".join(bound) + " |"
    )
    return "\n".join(lines)


ONE = Method(cfg_steps=0)  # one prediction a step: guidance is embedded, or distilled away
FAMILIES: tuple[tuple[Callable[[], PartFlops], Method], ...] = (
    (lambda: stable_diffusion_15(512), Method()),
    (stable_diffusion_21, Method()),
    (stable_diffusion_xl, Method()),
    (dit_xl_2, Method()),
    (pixart_sigma, Method()),
    (sana, Method()),
    (flux, replace(ONE, steps=28, guided=6)),
    (lambda: flux("schnell"), replace(ONE, steps=4, guided=2)),
)
COLUMNS = (
    "",
    "predictions, of them guided",
    "denoiser",
    "its backward pass",
    "decoder of guidance, both ways",
    "unguided sample",
    "guided sample",
    "ratio",
)


def of_families(families: Iterable[tuple[PartFlops, Method]]) -> str:
    """Markdown: a row for each model with the steps that it is asked for, in TFLOP."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for parts, method in families:
        with_cfg = method.steps if method.cfg_steps is None else method.cfg_steps
        numbers = (
            parts.denoiser.forward,
            parts.denoiser.backward,
            parts.tiny.both,
            method.unguided(parts),
            method.total(parts),
        )
        cells = [
            parts.name,
            f"{method.steps + with_cfg}, {method.guided}",
            *(_tera(number) for number in numbers),
            f"{method.ratio(parts):.2f}x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tera(flops: float) -> str:
    """A count in TFLOP, of a small model in three digits."""
    tera = flops / 1e12
    return f"{tera:.2f}" if tera >= 0.01 else f"{tera:.3g}"


def of_folder(generator: Generator, guided: int) -> tuple[PartFlops, Method]:
    """The parts of a folder, or of a published name, from its configurations alone. Without an
    unconditional prediction it makes one prediction a step.
    """
    pipeline = pipeline_of(generator)
    cfg_steps = None if pipeline.denoiser.null_label is not None else 0
    channels, height, width = pipeline.image_shape
    title = f"{Path(generator.pipeline).name}, {channels} x {height} x {width}"
    method = Method(steps=generator.steps, guided=guided, cfg_steps=cfg_steps)
    return beside_vit(title, pipeline), method


def main(arguments: list[str] | None = None) -> int:
    parser = new_parser("flops", __doc__)
    parser.add_argument(
        "--pipeline",
        metavar="FOLDER",
        help="count this folder of a diffusers pipeline, or this name, in place of the table",
    )
    parser.add_argument(
        "--class-names",
        metavar="A,B",
        default="",
        help="of a FOLDER that names none; how many they are costs nothing",
    )
    parser.add_argument("--height", type=int, default=0, help="of the images; 0: the folder's")
    parser.add_argument("--width", type=int, default=0, help="of the images; 0: the folder's")
    parser.add_argument("--steps", type=int, default=20, help="of a sample (default 20)")
    parser.add_argument("--guided", type=int, default=4, help="of these steps (default 4)")
    options = parser.parse_args(arguments)
    if options.pipeline is None:
        say(f"{table()}\n\n{of_families((make(), method) for make, method in FAMILIES)}")
        return 0
    if not 0 <= options.guided <= options.steps:
        wanted = f"at most steps = {options.steps}, and at least 0"
        raise InputError(f"guided = {options.guided}: expected {wanted}")
    names = tuple(name for name in options.class_names.split(",") if name)
    generator = Generator(
        pipeline=options.pipeline,
        class_names=names,
        height=options.height,
        width=options.width,
        steps=options.steps,
    )
    say(of_families([of_folder(generator, options.guided)]))
    return 0
