"""Compiles the Triton kernels of published denoisers and decoders before their first batch, in
several processes: `dpfast bench kernels`, on a GPU.

A kernel is compiled for each width: 131 times for Stable Diffusion 1.5, forward and backward, and
27 times for DiT-XL/2. In a first batch they come one after the other, 18 and 4 s of a CPU core on a
Xeon, without the code that launches them. What is launched is read on meta tensors. Triton keeps
what is compiled in its cache on disk, where other processes find it.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.arguments import new_parser
from benchmarks.harness.processes import command
from benchmarks.systems.traffic import ROWS
from dpfast.cli.parser import at_least
from dpfast.errors import InputError
from dpfast.ops import dispatch
from dpfast.planning.architectures import META, published

MODULES = (
    "bias_residual",
    "gate_norm_modulate",
    "geglu",
    "group_norm",
    "group_norm.triton",
    "relu_chain",
)
PROCESSES = 4


class Launch(NamedTuple):
    """A kernel, its arguments, dtypes in the place of tensors, and the options of its launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compiled(self) -> tuple[Any, ...]:
        """What Triton compiles it for: constants, types, and of other whole numbers whether they
        are multiples of 16.
        """
        found = []
        for parameter in self.kernel.params:
            value = self.arguments.get(parameter.name)
            if isinstance(value, int) and not isinstance(value, bool):
                if parameter.do_not_specialize:
                    value = "int"
                elif not parameter.is_constexpr:
                    value = "one" if value == 1 else "int" if value % 16 else "multiple"
            elif isinstance(value, float) and not parameter.is_constexpr:
                value = "float"
            found.append(value)
        return (self.kernel.__name__, *found, *self.options.values())

    def compile(self) -> None:
        given = [self.arguments[name] for name in self.kernel.arg_names]  # dtypes stand for tensors
        self.kernel.warmup(*given, grid=(1,), **self.options)


class _Recorded:
    """In the place of a kernel."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*given: Any, **named: Any) -> None:
            names = self.kernel.arg_names
            arguments = dict(zip(names, given, strict=False))
            arguments |= {name: named.pop(name) for name in names if name in named}
            for name, value in arguments.items():
                if isinstance(value, Tensor):
                    arguments[name] = value.dtype
            self.launches.append(Launch(self.kernel, arguments, named))

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of operations on meta tensors, which elsewhere are looked at and not made."""
    launches: list[Launch] = []
    kept: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        kept.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    for name in MODULES:
        module = importlib.import_module(f"dpfast.ops.{name}")
        for found, value in list(vars(module).items()):
            if found.endswith("_kernel") and hasattr(value, "warmup"):
                put(module, found, _Recorded(value, launches))
        for operation, function in (("_operation", "_forward"), ("_derivative", "_backward")):
            if hasattr(module, operation):
                put(module, operation, getattr(module, function))
    put(dispatch, "in_graph", _is_taped)
    try:
        yield launches
    finally:
        for owner, name, value in reversed(kept):
            setattr(owner, name, value)


def _is_taped(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def launches(name: str) -> list[Launch]:
    """Those of a batch that need a compilation each: plain and guided steps, the tiny decoder with
    its gradient, and the decoder.
    """
    pipeline = published(name, dtype=torch.bfloat16, fused=True)
    with META:
        x = torch.empty(ROWS[name] // 2, *pipeline.denoiser.sample_shape)  # type: ignore[attr-defined]
        labels = torch.zeros(len(x), dtype=torch.int64)
        timestep = torch.empty((), dtype=torch.int64)

    def with_gradient(call: Any, *given: Tensor) -> None:
        latents = x.detach().requires_grad_()
        result = call(latents, *given)
        torch.autograd.grad(result, latents, torch.empty_like(result))

    with recorded() as found:
        with torch.no_grad():
            pipeline.denoiser(x, timestep, labels)
        with_gradient(pipeline.denoiser, timestep, labels)
        with_gradient(pipeline.guidance_decoder)
        with torch.no_grad():
            pipeline.decoder(x)
    return list({launch.compiled(): launch for launch in found}.values())


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("kernels", __doc__)
    parser.add_argument(
        "--models", default="|".join(ROWS), help=f"of {', '.join(ROWS)}, | between several"
    )
    parser.add_argument(
        "--part",
        type=at_least(0),
        metavar="N",
        help=f"only every {PROCESSES}th kernel, from the Nth on, in this process",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where a process fails. Raises ``InputError`` without a GPU, and for other models."""
    options = _arguments(arguments)
    names = options.models.split("|")
    for name in names:
        if name not in ROWS:
            raise InputError(f"models = {name!r}: expected {' or '.join(ROWS)}")
    if not torch.cuda.is_available():
        raise InputError("the suite kernels needs a GPU, for which it compiles")
    if options.part is not None:
        found = [launch for name in names for launch in launches(name)]
        for launch in found[options.part :: PROCESSES]:
            launch.compile()
        return 0
    started = time.perf_counter()
    same = command("benchmarks.run", "kernels", "--models", options.models)
    running = [subprocess.Popen([*same, "--part", str(part)]) for part in range(PROCESSES)]
    failed = [process.wait() for process in running]
    print(f"kernels of {', '.join(names)}: {time.perf_counter() - started:.0f} s", flush=True)
    return 1 if any(failed) else 0
