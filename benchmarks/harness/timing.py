"""Times of several variants, taken in turns so that a slow minute of the machine meets all of
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from dpfast.textfiles import lines
from dpfast.version import __version__

SHORTEST = 2e-3  # seconds of one measurement; shorter calls are repeated within it
COPY_BYTES = 256 << 20
REPLAYED = 10  # calls of one CUDA graph


@dataclass(frozen=True)
class Times:
    """Seconds of one call, one entry a round."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    def each(self, calls: int) -> Times:
        """Of one of the calls that were timed as one."""
        return Times([seconds / calls for seconds in self.seconds])


def _once(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of `repeats` calls; on a GPU between two events of its stream."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def replayed(call: Callable[[], object]) -> Callable[[], object] | None:
    """`REPLAYED` calls as one CUDA graph: the device's time without the host's; None where a call
    waits for it.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(REPLAYED):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def interleave(
    variants: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Times]:
    """`rounds` measurements of each variant, A B C A B C; the first call of each is warm-up and not
    counted.
    """
    repeats = {}
    for name, call in variants.items():
        call()
        single = _once(call, 1, device)
        repeats[name] = max(1, int(SHORTEST / max(single, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            seconds[name].append(_once(call, repeats[name], device) / repeats[name])
    return {name: Times(values) for name, values in seconds.items()}


def synchronise(device: torch.device) -> None:
    """Waits for the work in the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that the device's allocator held at one moment of a call, beyond what it held
    before.

    On a CPU read from the profiler's events, so that compiled and eager calls count alike.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        call()
    events = [
        event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def copy_of(total_bytes: int, device: torch.device) -> Callable[[], object]:
    """A plain copy that moves `total_bytes`, half of them read and half written, between buffers
    that exist.
    """
    source = torch.ones(max(total_bytes // 8, 1), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


@contextlib.contextmanager
def pages(kind: str) -> Iterator[None]:
    """How the C library treats large results: "fresh" maps new pages for each (its default),
    "reused" keeps them.

    Without a new page a result costs no page fault; a caller gets the same from `out=` buffers or a
    caching allocator.
    """
    libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
    if kind == "reused" and libc is not None and hasattr(libc, "mallopt"):
        mmap_max, trim_threshold = -4, -1
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        yield
        libc.mallopt(mmap_max, 65536)
        libc.mallopt(trim_threshold, 128 << 10)
        libc.malloc_trim(0)
    else:
        yield


def machine(device: torch.device) -> dict[str, object]:
    """What a record needs to be compared with another one."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        told = lines(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        cpu = next(line.split(":")[1].strip() for line in told if line.startswith("model name"))
    described: dict[str, object] = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    with contextlib.suppress(ImportError):
        import triton

        described["triton"] = triton.__version__
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    if (ROOT / ".git").exists():  # an environment may lie in a repository of its user's
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "describe", "--always", "--dirty"]
            described["commit"] = subprocess.run(
                command, cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
            ).stdout.strip()
    else:
        described["version"] = __version__
    return described


def append(
    file: Path, suite: str, records: Iterable[Mapping[str, Any]], device: torch.device | str = "cpu"
) -> None:
    """Appends the records to a file, a line of JSON each, with the suite, the moment and the
    machine before them.
    """
    before = described(suite, torch.device(device))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps({**before, **record}) + "\n" for record in records)


def described(suite: str, device: torch.device) -> dict[str, object]:
    """The suite, the moment and the machine."""
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"suite": suite, "when": when, **machine(device)}
