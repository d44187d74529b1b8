"""Large results on small and on large pages, beside torch.compile and a clone of the result.

    dpfast bench pages

Every result lies on new pages, as a large one does. A guest with free page reporting hands the free
blocks of its memory back to its host within two seconds: so dpfast is timed at once after a call of
the same kind and after ``REST`` seconds, in turns with its rivals.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.harness import timing
from benchmarks.harness.arguments import new_parser
from benchmarks.harness.registry import COMPILED, OURS, OURS_OUT, cases
from dpfast.cli.parser import at_least, in_one_line
from dpfast.ops import dispatch

LEAST = 16 << 20  # bytes of a result that is measured
REST = 3.0
MMAP_THRESHOLD = -3  # a parameter of the C library's mallopt: what is larger gets pages of its own


def _milliseconds(call: Callable[[], object], large: bool | None = None) -> float:
    if large is not None:
        dispatch.native_module().large_pages(large)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _result(value: object) -> torch.Tensor:
    found = value[-1] if isinstance(value, tuple) else value
    assert isinstance(found, torch.Tensor)
    return found


def _rows(rounds: int) -> list[str]:
    rows = []
    cpu = torch.device("cpu")
    for case in cases("ops"):
        if case.gpu_only or case.bytes is None:
            continue
        variants = case.build(cpu)
        ours, compiled, into = variants[OURS], variants[COMPILED], variants[OURS_OUT]
        result = _result(ours()).clone()
        if result.nbytes < LEAST:
            continue
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, call in ((COMPILED, compiled), ("clone", result.clone), (OURS_OUT, into)):
                times.setdefault(name, []).append(_milliseconds(call))
            for large in (False, True):
                time.sleep(REST)
                for when in ("rested", "again"):
                    name = f"{'large' if large else 'small'}, {when}"
                    times.setdefault(name, []).append(_milliseconds(ours, large))
        rows += [
            f"| {case.name} | {name} | {statistics.median(t):.1f} | {min(t):.1f} |"
            for name, t in times.items()
        ]
    return rows


def main(arguments: list[str]) -> int:
    """0, or 2 for arguments that cannot work."""
    return in_one_line("dpfast bench pages", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    parser = new_parser("pages", __doc__)
    parser.add_argument(
        "--rounds", type=at_least(1), default=7, help="measurements of each variant (default 7)"
    )
    options = parser.parse_args(arguments)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 128 << 10)
    machine = timing.described("pages", torch.device("cpu"))
    reported = not dispatch.native_module().large_pages(False)
    print(
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        f"hands free blocks back: {'yes' if reported else 'no'}",
        file=sys.stderr,
    )
    print("| case | variant | median ms | min ms |\n| --- | --- | --- | --- |")
    print("\n".join(_rows(options.rounds)))
    return 0
