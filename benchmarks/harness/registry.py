"""What can be measured: the modules of `benchmarks.cases` list their cases."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Variants = dict[str, Callable[[], object]]
SUITES = {
    "ops": (
        "entropy",
        "gather",
        "guided_step",
        "noise",
        "group_norm",
        "bias_residual",
        "geglu",
        "gate_norm_modulate",
        "relu_chain",
    ),
    "pool": ("pool",),
    "loader": ("loader",),
    "theory": ("theory",),
}
OURS = "dpfast"
OURS_OUT = "dpfast, out="
EAGER = "eager"
COMPILED = "torch.compile"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size.

    `tests` is the file that has to pass before anything is timed. `build` makes the inputs on a
    device and returns the variants, callables without arguments; it asserts first that they agree.
    `bytes` is the traffic by the operation's formula, each input read and each output written once;
    None where arithmetic or latency is the limit. `targets` maps a rival's name to the speed-up
    that is asked for on a CPU, "copy" to the share of the copy bandwidth. `gpu_only`: a CPU runs
    plain PyTorch, so there is nothing to measure on one.
    """

    operation: str
    size: str
    tests: str
    build: Callable[[torch.device], Variants]
    bytes: int | None = None
    targets: dict[str, float] = field(default_factory=dict)
    gpu_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.operation}: {self.size}"


def cases(suite: str) -> list[Case]:
    """The cases of a suite, in the order of its files; those of other suites may need packages that
    are not there.
    """
    modules = (importlib.import_module(f"benchmarks.cases.{module}") for module in SUITES[suite])
    return [case for module in modules for case in module.CASES]
