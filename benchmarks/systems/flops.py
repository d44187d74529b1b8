"""The ablation of the sampler in FLOPs at the sizes that people use, derived on meta tensors:
`dpfast bench flops`.
"""

from __future__ import annotations

from benchmarks.harness.arguments import new_parser
from dpfast.hardware.peaks import samples_per_second
from dpfast.planning.methods import (
    PREDECESSOR,
    Method,
    dit_xl_2,
    stable_diffusion_15,
    stable_diffusion_21,
    stable_diffusion_xl,
)

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


def main(arguments: list[str] | None = None) -> int:
    new_parser("flops", __doc__).parse_args(arguments)
    print(table())
    return 0
