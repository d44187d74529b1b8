"""Peaks of devices: what their makers publish, and what this machine is measured to do."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dpfast.config import RecipeError
from dpfast.generate.runtime.memory import available_bytes
from dpfast.roofline.counting import Counts

HERE = "here"


@dataclass(frozen=True, kw_only=True)
class Device:
    """half, full: dense FLOP/s in 16-bit and in 32-bit floats; bandwidth: of its memory, bytes/s; memory: bytes.

    link, network: bytes/s to the other devices of its node and, through an adapter of its own, to other nodes, in one
    direction. host, disk: bytes of a node's memory and of its local drives over its devices; None: what is free here.
    """

    name: str
    half: float
    full: float
    bandwidth: float
    memory: float
    link: float
    network: float
    host: float | None = None
    disk: float | None = None

    def limits(self, counts: Counts) -> dict[str, float]:
        """Seconds that the counted work takes at least: of "compute", and of "memory"."""
        return {
            "compute": counts.half / self.half + counts.full / self.full,
            "memory": counts.moved / self.bandwidth,
        }


# SXM modules by NVIDIA's data sheets. half: bf16 and fp16 on tensor cores, dense; those of the H100 (2023), the H200
# (2024) and the DGX B200 (2024, an eighth of it) print twice as much, "with sparsity". full: IEEE fp32, which is what
# PyTorch's matrix products take unless TF32 is allowed. link: half of NVLink's bandwidth, which is of both directions.
# network, host, disk: an eighth of a DGX (data sheets of the DGX A100 640GB, H100, H200 and B200): eight adapters, of
# 200 Gbit/s in the A100's and of 400 in the others, 2 TB of memory and eight drives of 3.84 TB.
DGX = {"host": 2e12 / 8, "disk": 3.84e12}
DEVICES = {
    "a100": Device(
        name="A100", half=312e12, full=19.5e12, bandwidth=2.04e12, memory=80e9, link=300e9, network=25e9, **DGX
    ),
    "h100": Device(
        name="H100", half=989e12, full=67e12, bandwidth=3.35e12, memory=80e9, link=450e9, network=50e9, **DGX
    ),
    "h200": Device(
        name="H200", half=989e12, full=67e12, bandwidth=4.8e12, memory=141e9, link=450e9, network=50e9, **DGX
    ),
    "b200": Device(
        name="B200", half=2250e12, full=75e12, bandwidth=8e12, memory=180e9, link=900e9, network=50e9, **DGX
    ),
}
LOOPBACK = 1e9  # bytes/s between processes of this machine: about what gloo was measured to do (docs/scaling.md)
NODE = 8  # devices behind one NVLink switch
OTHERS = frozenset({"PCIe", "PCIE", "NVL", "MIG"})  # in the name of a module that is not one of the table, or a part


def device(name: str) -> Device:
    """A device of the table, or "here": this machine, measured. Raises ``RecipeError`` for another name."""
    if name.lower() == HERE:
        return here()
    if name.lower() not in DEVICES:
        raise RecipeError(f"device = {name!r}: expected one of {', '.join(DEVICES)}, or {HERE!r} for this machine")
    return DEVICES[name.lower()]


def limit(name: str, flops_per_sample: float, *, share: float = 1.0) -> float:
    """Samples/s at ``share`` of the peak of a device. Raises ``RecipeError`` for an unknown one."""
    return share * device(name).half / flops_per_sample


def peaks_of(device: torch.device) -> Device | None:
    """The peaks of a run's device: a GPU of the table, or this CPU, measured; None where they are not known."""
    if device.type == "cpu":
        return here()
    words = frozenset(re.split(r"[ -]", torch.cuda.get_device_name(device)))
    return None if words & OTHERS else next((known for known in DEVICES.values() if known.name in words), None)


@functools.cache
def here(rounds: int = 5) -> Device:
    """This machine: the best of ``rounds`` of large matrix products, in fp32 alone on a CPU, and of a copy."""
    gpu = torch.cuda.is_available()
    kind, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    side = 8192 if gpu else 2048
    a, b = (torch.ones(side, side, device=kind, dtype=dtype) for _ in range(2))
    source = torch.ones(1 << 26, device=kind, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(rounds):
            if gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    peak = 2 * side**3 / best(lambda: torch.mm(a, b))
    return Device(
        name=torch.cuda.get_device_name() if gpu else f"this CPU with {torch.get_num_threads()} threads",
        half=peak,
        full=2 * side**3 / best(lambda: torch.mm(a.float(), b.float())) if gpu else peak,
        bandwidth=2 * source.nbytes / best(lambda: target.copy_(source)),
        memory=float(available_bytes(torch.device(kind))),
        link=LOOPBACK,
        network=LOOPBACK,
    )
