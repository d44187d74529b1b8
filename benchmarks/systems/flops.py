"""The ablation of the sampler in FLOPs at the sizes that people use, derived on meta tensors:
`dpfast bench flops`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.harness.arguments import new_parser
from dpfast.hardware.peaks import samples_per_second
from dpfast.planning.methods import (
    PREDECESSOR,
    Method,
    PartFlops,
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


def of_families() -> str:
    """Markdown: a row for each model with the steps that its card asks for, in TFLOP."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for make, method in FAMILIES:
        parts = make()
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
            *(f"{number / 1e12:.2f}" for number in numbers),
            f"{method.ratio(parts):.2f}x",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    new_parser("flops", __doc__).parse_args(arguments)
    say(f"{table()}\n\n{of_families()}")
    return 0
