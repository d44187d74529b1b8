"""Launches and bytes of published denoisers and their decoder, plain and fused, counted on meta
tensors in bf16: `dpfast bench traffic`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.arguments import new_parser
from dpfast.hardware.traffic import Traffic, count_traffic
from dpfast.planning.architectures import META, published
from dpfast.terminal import say

# rows of a step without a tape: samples, conditional and not
ROWS = {"stable-diffusion-1.5": 32, "dit-xl-2": 64}


def counts(name: str, *, fused: bool) -> dict[str, Traffic]:
    """A plain step of all rows, the gradients of a guided step's conditional half through denoiser
    and tiny decoder, and the decoding of that half.
    """
    rows = ROWS[name]
    half = rows // 2
    pipeline = published(name, dtype=torch.bfloat16, fused=fused)
    denoiser = pipeline.denoiser
    if not fused and hasattr(denoiser.model, "conv_in"):  # type: ignore[attr-defined]
        denoiser.model.to(memory_format=torch.channels_last)  # type: ignore[attr-defined]
    with META:
        x = torch.empty(rows, *denoiser.sample_shape)
        labels = torch.zeros(rows, dtype=torch.int64)
        timestep = torch.empty((), dtype=torch.int64)

    return {
        f"step of {rows} rows": without_tape(denoiser, x, timestep, labels),
        f"prediction and gradient of {half}": with_gradient(
            denoiser, x[:half], timestep, labels[:half]
        ),
        f"tiny decoder and gradient, {half} images": with_gradient(
            pipeline.guidance_decoder, x[:half]
        ),
        f"decoder, {half} images": without_tape(pipeline.decoder, x[:half]),
    }


def without_tape(call: Callable[..., object], *given: Tensor) -> Traffic:
    """A call that nothing is differentiated of."""
    with torch.no_grad():
        return count_traffic(lambda: call(*given))


def with_gradient(call: Callable[..., Tensor], x: Tensor, *given: Tensor) -> Traffic:
    """A call and the gradient of its first argument."""

    def both() -> None:
        leaf = x.detach().requires_grad_(True)
        result = call(leaf, *given)
        torch.autograd.grad(result, leaf, torch.empty_like(result))

    return count_traffic(both)


def table() -> str:
    """Markdown: launches, gigabytes beside the products, copies that only transpose."""
    lines = [
        "| | launches | fused | GB beside products | fused | transposing copies | fused |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        plain, fused = counts(name, fused=False), counts(name, fused=True)
        for part, before in plain.items():
            after = fused[part]
            lines.append(
                f"| {name}, {part} | {before.launches} | {after.launches} | "
                f"{before.pointwise / 1e9:.1f} | {after.pointwise / 1e9:.1f} | "
                f"{before.layout_copies} | {after.layout_copies} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    new_parser("traffic", __doc__).parse_args(arguments)
    say(table())
    return 0
