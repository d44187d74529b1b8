"""Measures the operations beside their rivals and prints the table: `python -m benchmarks.run ops`.

All variants of a case take turns in one process, with a plain copy of the same bytes among them.
Ratios in one such run are what counts; the seconds of a shared CPU are not. On a CPU each case is
measured with fresh and with reused pages, because a result of many megabytes costs page faults that
have nothing to do with the operation; on a GPU launched from Python and replayed from a CUDA graph,
because a small operation takes the host longer than the device.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.harness import gate, timing
from benchmarks.harness.arguments import add_device, add_record
from benchmarks.harness.registry import OURS, OURS_OUT, Case, cases
from dpfast.cli.parser import Parser, at_least, in_one_line
from dpfast.errors import InputError
from dpfast.terminal import say, width

COPY = "copy"
HEADING = 2  # lines of a table before its rows
CASES = ("ops", "pool", "loader")  # suites of cases
KINDS = {"cpu": ("fresh", "reused"), "cuda": ("launched", "replayed")}
TABLES = {
    "sampler": "benchmarks.systems.ablation",
    "cheaper": "benchmarks.systems.cheaper_steps",
    "float8": "benchmarks.systems.float8",
    "models": "benchmarks.systems.models",
    "images": "benchmarks.systems.images",
    "experiments": "benchmarks.experiments.bench",
    "regions": "benchmarks.systems.compile_regions",
    "flops": "benchmarks.systems.flops",
    "traffic": "benchmarks.systems.traffic",
    "kernels": "benchmarks.systems.kernels",
    "seconds": "benchmarks.systems.seconds",
    "study": "benchmarks.studies.study",
    "anchored": "benchmarks.studies.anchored",
    "evidence": "benchmarks.studies.evidence",
    "uses": "benchmarks.studies.uses",
    "theory": "benchmarks.cases.theory",
    "precision": "benchmarks.systems.precision",
    "learner": "benchmarks.systems.learner",
    "plan": "benchmarks.systems.planner",
    "patience": "benchmarks.studies.patience",
    "rehearsal": "benchmarks.systems.rehearsal",
    "scaling": "benchmarks.systems.scaling",
    "overhead": "benchmarks.systems.overhead",
    "pages": "benchmarks.systems.pages",
    "guidance": "benchmarks.systems.guidance",
    "ranks": "benchmarks.systems.ranks",
}
Record = dict[str, Any]


def measure(case: Case, device: torch.device, rounds: int) -> list[Record]:
    """One record for each kind of pages, or way to launch: seconds of the variants, ratios where
    there are targets.
    """
    variants = case.build(device)
    if case.bytes is not None:
        variants[COPY] = timing.copy_of(case.bytes, device)
    records = []
    for kind in KINDS[device.type]:
        if kind == "replayed":
            graphs = {name: timing.replayed(call) for name, call in variants.items()}
            times = timing.interleave(
                {name: g for name, g in graphs.items() if g is not None}, rounds, device
            )
            times = {name: t.each(timing.REPLAYED) for name, t in times.items()}
        else:
            with timing.pages(kind):
                times = timing.interleave(variants, rounds, device)
        rivals = {name: times[name].median for name in times if name not in (OURS, OURS_OUT)}
        records.append(
            {
                "case": case.name,
                "pages": kind,
                "rounds": rounds,
                "bytes": case.bytes,
                "seconds": {
                    name: {"median": t.median, "minimum": t.minimum} for name, t in times.items()
                },
                # Rival over dpfast: a speed-up, or for the copy the share of its bandwidth.
                "ratios": {
                    ours: {name: median / times[ours].median for name, median in rivals.items()}
                    for ours in (OURS, OURS_OUT)
                    if ours in times
                },
                "targets": case.targets if device.type == "cpu" else {},
            }
        )
    return records


def _ratio(record: Record, ours: str, rival: str) -> str:
    value = record["ratios"].get(ours, {}).get(rival)
    return "" if value is None else f"{value:.0%}" if rival == COPY else f"{value:.2f}x"


def table(records: Iterable[Record]) -> str:
    """The records as a Markdown table: a line for each rival, with what dpfast gains on it."""
    header = (
        "case",
        "pages or way",
        "rival",
        "median ms",
        "min ms",
        "dpfast",
        "dpfast, out=",
        "target",
    )
    lines = [header, ("---",) * len(header)]
    for record in records:
        for name, seconds in record["seconds"].items():
            target = record["targets"].get(name)
            lines.append(
                (
                    record["case"],
                    record["pages"],
                    name,
                    f"{seconds['median'] * 1e3:.4g}",
                    f"{seconds['minimum'] * 1e3:.4g}",
                    _ratio(record, OURS, name),
                    _ratio(record, OURS_OUT, name),
                    "" if target is None else f"{target:.0%}" if name == COPY else f"{target:g}x",
                )
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="dpfast bench", description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=[*CASES, *TABLES], help="what is measured")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--rounds", type=at_least(1), default=15, help="measurements of each variant (default 15)"
    )
    add_device(parser)
    add_record(parser, "SUITE")
    parser.add_argument(
        "--tested", action="store_true", help="the tests have just passed: do not run them again"
    )
    parser.add_argument(
        "--no-gate", action="store_true", help="skip the tests, and with them the speed-ups"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0, 1 where a suite misses what it promises, or 2 for arguments that cannot work."""
    given = sys.argv[1:] if arguments is None else arguments
    return in_one_line("dpfast bench", lambda: _run(given))


def _run(given: list[str]) -> int:
    if given and given[0] in TABLES:  # tables of their own columns
        return int(importlib.import_module(TABLES[given[0]]).main(given[1:]))
    options = _arguments(given)
    on_gpu = options.device.type == "cuda"
    available = [case for case in cases(options.suite) if on_gpu or not case.gpu_only]
    chosen = [case for case in available if options.only in case.name]
    if not chosen:
        names = "; ".join(case.name for case in available)
        raise InputError(
            f"only = {options.only!r}: no case of {options.suite} has it; there are: {names}"
        )
    device = options.device
    print(
        ", ".join(
            f"{key} {value}" for key, value in timing.described(options.suite, device).items()
        ),
        file=sys.stderr,
    )
    failed = False
    kept = None if options.record is None or options.no_gate else options.record
    file = None if kept is None else kept / f"{options.suite}.jsonl"
    if file is not None:
        timing.append(file, options.suite, [], device)
    columns = width()
    if columns is None:
        print(table([]), flush=True)
    for case in chosen:
        report = None if options.no_gate or options.tested else gate.failure(case.tests)
        if report is not None:
            print(f"{case.name}: its tests fail, nothing is timed\n{report}", file=sys.stderr)
            failed = True
            continue
        records = measure(case, device, options.rounds)
        if options.no_gate:
            records = [record | {"ratios": {}, "targets": {}} for record in records]
        # each as soon as it is there: a run that is cut off has the others
        if columns is None:
            print(*table(records).split("\n")[HEADING:], sep="\n", flush=True)
        else:
            say(f"{table(records)}\n")
        if file is not None:
            timing.append(file, options.suite, records, device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
