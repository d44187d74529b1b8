"""Peaks of devices: what their makers publish, and what this machine is measured to do."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dpfast.errors import InputError
from dpfast.hardware.flops import Counts
from dpfast.hardware.memory import available_bytes
from dpfast.ops.frozen_linear import frozen_linear
from dpfast.ops.quantise import HOPPER, quantise

HERE = "here"
ROUNDS, MEASURED = 5, 0.1  # of each measurement of this machine: calls, seconds


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The peaks of a device.

    Attributes:
        name: Name of the device.
        half: Dense FLOP/s in 16-bit floats.
        full: Dense FLOP/s in 32-bit floats.
        bandwidth: Bandwidth of its memory, bytes/s.
        memory: Bytes of its memory.
        link: Bytes/s to the other devices of its node, in one direction.
        network: Bytes/s to other nodes, through an adapter of its own, in one direction.
        host: Bytes of a node's memory over its devices; None: what is free here.
        disk: Bytes of a node's local drives over its devices; None: what is free here.
        float8: FLOP/s in 8-bit floats with a factor for each row; None: it has none.
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
    float8: float | None = None

    @property
    def gpu(self) -> bool:
        """True for a device with units for 16-bit floats: all GPUs of the table, no CPU here."""
        return self.half > self.full

    def limits(self, counts: Counts) -> dict[str, float]:
        """Returns seconds that the counted work takes at least: of "compute", and of "memory"."""
        return {
            "compute": counts.half / self.half
            + counts.full / self.full
            + counts.float8 / (self.float8 or self.half),
            "memory": counts.moved / self.bandwidth,
        }


# SXM modules by NVIDIA's data sheets. half: bf16 and fp16 on tensor cores, dense; those of the H100
# (2023), the H200 (2024) and the DGX B200 (2024, an eighth of it) print twice as much, "with
# sparsity". float8: e4m3, dense: half of the 3,958 TFLOP/s of the H100 and the H200 and of an
# eighth of the DGX B200's 72,000. full: IEEE fp32, which is what PyTorch's matrix products take
# unless TF32 is allowed. link: half of NVLink's bandwidth, which is of both directions. network,
# host, disk: an eighth of a DGX (data sheets of the DGX A100 640GB, H100, H200 and B200): eight
# adapters, of 200 Gbit/s in the A100's and of 400 in the others, 2 TB of memory and eight drives of
# 3.84 TB. The RTX 4090 by NVIDIA's white paper of the Ada architecture (2022, appendix A): half is
# dense with sums in fp32; no NVLink, link is PCIe 4.0 x16; its float8 is not used here. Around it a
# workstation, stated: 64 GB of memory, 2 TB of disk, 10 Gbit/s of network.
DGX = {"host": 2e12 / 8, "disk": 3.84e12}
DEVICES = {
    "a100": Peaks(
        name="A100",
        half=312e12,
        full=19.5e12,
        bandwidth=2.04e12,
        memory=80e9,
        link=300e9,
        network=25e9,
        **DGX,
    ),
    "h100": Peaks(
        name="H100",
        half=989e12,
        float8=1979e12,
        full=67e12,
        bandwidth=3.35e12,
        memory=80e9,
        link=450e9,
        network=50e9,
        **DGX,
    ),
    "h200": Peaks(
        name="H200",
        half=989e12,
        float8=1979e12,
        full=67e12,
        bandwidth=4.8e12,
        memory=141e9,
        link=450e9,
        network=50e9,
        **DGX,
    ),
    "b200": Peaks(
        name="B200",
        half=2250e12,
        float8=4500e12,
        full=75e12,
        bandwidth=8e12,
        memory=180e9,
        link=900e9,
        network=50e9,
        **DGX,
    ),
    "rtx4090": Peaks(
        name="RTX 4090",
        half=165.2e12,
        full=82.6e12,
        bandwidth=1.008e12,
        memory=24e9,
        link=31.5e9,
        network=1.25e9,
        host=64e9,
        disk=2e12,
    ),
}
# bytes/s between processes of this machine: about what gloo was measured to do
# (docs/records/scaling.md)
LOOPBACK = 1e9
NODE = 8  # devices behind one NVLink switch
# In the name of a module that is not one of the table, or a part of one:
OTHERS = frozenset({"PCIe", "PCIE", "NVL", "MIG", "Laptop", "D"})


def peaks_named(name: str) -> Peaks:
    """Returns a device of the table, or "here": this machine, measured. Raises ``InputError`` for
    another name.
    """
    if name.lower() == HERE:
        return here()
    if name.lower() not in DEVICES:
        raise InputError(
            f"device = {name!r}: expected one of {', '.join(DEVICES)}, or {HERE!r} for this machine"
        )
    return DEVICES[name.lower()]


def samples_per_second(name: str, flops_per_sample: float, *, share: float = 1.0) -> float:
    """Returns the samples/s at ``share`` of the peak of a device. Raises ``InputError`` for an
    unknown one.
    """
    return share * peaks_named(name).half / flops_per_sample


def peaks_of(device: torch.device) -> Peaks | None:
    """Returns the peaks of a run's device: a GPU of the table, or this CPU, measured; None where
    they are not known.
    """
    if device.type == "cpu":
        return here()
    words = frozenset(re.split(r"[ -]", torch.cuda.get_device_name(device)))
    known = (device for device in DEVICES.values() if words >= set(device.name.split()))
    return None if words & OTHERS else next(known, None)


@functools.cache
def here() -> Peaks:
    """Returns this machine: the best that it is seen to do of products of random numbers, and of a
    copy.

    A CPU multiplies in fp32 alone, by the best of its libraries: oneDNN's layers, which a frozen
    denoiser and a learner's convolutions take, may do twice what ``torch.mm`` does.
    """
    gpu = torch.cuda.is_available()
    kind = torch.device("cuda" if gpu else "cpu")
    eight = gpu and torch.cuda.get_device_capability() >= HOPPER
    # a run's own numbers stay its own
    with torch.random.fork_rng([torch.cuda.current_device()] if gpu else []):
        full = max(work / _best(call, kind) for work, call in _products(kind, torch.float32))
        half = (
            max(work / _best(call, kind) for work, call in _products(kind, torch.bfloat16))
            if gpu
            else full
        )
        float8 = _float8_peak(kind) if eight else None
        source = torch.randint(256, (1 << 26,), device=kind, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return Peaks(
        name=torch.cuda.get_device_name()
        if gpu
        else f"this CPU with {torch.get_num_threads()} threads",
        half=half,
        full=full,
        float8=float8,
        bandwidth=2 * source.nbytes / _best(lambda: target.copy_(source), kind),
        memory=float(available_bytes(kind)),
        link=LOOPBACK,
        network=LOOPBACK,
    )


def _products(device: torch.device, dtype: torch.dtype) -> list[tuple[float, Callable[[], object]]]:
    """Returns FLOPs, and a call that does them: large products on a GPU, of sizes that stay in a
    CPU's caches there.
    """
    side = 8192 if device.type == "cuda" else 1024
    # constants may run faster and cooler
    random = functools.partial(torch.randn, device=device, dtype=dtype)
    a, b = random(side, side), random(side, side)
    products: list[tuple[float, Callable[[], object]]] = [(2 * side**3, lambda: torch.mm(a, b))]
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        rows = 2048
        for inside, out in ((256, 768), (768, 192)):
            layer = functools.partial(
                frozen_linear, random(rows, inside), random(inside, out).t(), random(out)
            )
            products.append((2 * rows * inside * out, layer))
        images = 64
        channels = 256
        width = 8
        kernel = random(channels, channels, 3, 3).to(memory_format=torch.channels_last)
        batch = random(images, channels, width, width).to(memory_format=torch.channels_last)
        work = 2 * images * width**2 * 9 * channels**2
        products.append((work, lambda: F.conv2d(batch, kernel, padding=1)))
    return products


def _float8_peak(device: torch.device) -> float | None:
    """Returns none where this build of torch has no such product, which no other peak needs."""
    try:
        work, product = float8_product(device, 8192)
        return work / _best(product, device)
    except RuntimeError:
        return None


def float8_product(device: torch.device, side: int) -> tuple[float, Callable[[], object]]:
    """Returns FLOPs, and a call that does them as a frozen layer in float8 does: factors for each
    row, a result in bf16.
    """
    rows, weight = (
        quantise(torch.randn(side, side, device=device, dtype=torch.bfloat16)) for _ in range(2)
    )
    call = functools.partial(
        torch._scaled_mm,
        rows.values,
        weight.values.t(),
        rows.scales,
        weight.scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return 2 * side**3, call


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Returns the least seconds of a call, of the ROUNDS or more that MEASURED takes."""
    times: list[float] = []
    while len(times) < ROUNDS or sum(times) < MEASURED:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
