"""The experiments beside what dpfast runs today, correctness first: `dpfast bench experiments`.

Times are replayed from CUDA graphs, in turns. Before a variant is timed its results are compared
with fp64, at the size that is timed, in memory that held NaN; what is wrong is not timed. With
--interpret nothing is timed: both experiments are compared in Triton's interpreter, at sizes that
fit no tile. With --audit they are compiled for an H100 and read. Neither needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import RESULTS
from benchmarks.experiments import attention, geglu_product, machine_code
from benchmarks.harness import timing
from benchmarks.harness.arguments import add_device, add_record, new_parser
from benchmarks.harness.processes import command
from dpfast import ops
from dpfast.cli.parser import at_least
from dpfast.errors import InputError
from dpfast.generate.models.attention import CUDNN, EFFICIENT, FLASH, attend
from dpfast.ops import audit, dispatch

RECORDS = RESULTS / "experiments.jsonl"
CPU = torch.device("cpu")
ATTENTION, GEGLU = 1.1, 1.2  # of the fastest rival's time over ours: what lets an experiment in
SLICE = 2  # heads of one sample, or thousands of rows, that are compared with fp64
Results = tuple[Tensor, ...]
Record = dict[str, Any]


class Error(NamedTuple):
    """The norm of a difference over the norm, and its largest value over the largest."""

    norm: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question at one size.

    rivals, ours: calls of what is compared. exact: a part of the results of such a call, and the
    same in fp64, with their names. needed: what the fastest of ours must gain on the fastest rival.
    flops: of one call, the useful ones.
    """

    name: str
    dtype: torch.dtype
    rivals: dict[str, Callable[[], Results]]
    ours: dict[str, Callable[[], Results]]
    exact: Callable[[Results], dict[str, tuple[Tensor, Tensor]]]
    needed: float
    flops: int


def _on(backend: SDPBackend | None, *given: Tensor) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(*given)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*given)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "dpfast's choice": attend,
    "torch's choice": partial(_on, None),
    "cuDNN": partial(_on, CUDNN),
    "flash": partial(_on, FLASH),
    "efficient": partial(_on, EFFICIENT),
}


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, H d) as the fused blocks hand it to their attention."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_case(
    samples: int,
    heads: int,
    queries: int,
    keys: int,
    head_size: int,
    *,
    device: torch.device,
    forms: tuple[attention.Tiles, ...],
    backward: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """queries, keys: equal ones come from one joined projection, others from two."""
    width = heads * head_size
    torch.manual_seed(0)
    if queries == keys:
        parts = torch.randn(samples, queries, 3 * width, device=device).to(dtype).chunk(3, dim=-1)
    else:
        text = torch.randn(samples, keys, 2 * width, device=device).to(dtype)
        parts = (torch.randn(samples, queries, width, device=device).to(dtype), *text.chunk(2, -1))
    q, k, v = (_heads(part, heads) for part in parts)
    dout = _heads(torch.randn(samples, queries, width, device=device).to(dtype), heads)

    def run(function: Callable[..., Tensor]) -> Results:
        if not backward:
            return (function(q, k, v),)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = function(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    def exact(results: Results) -> dict[str, tuple[Tensor, Tensor]]:
        few = slice(-1, None), slice(-SLICE, None)  # the last ones, at the largest addresses
        wide = [t[few].double().requires_grad_(backward) for t in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(*wide)
        truth = [out.detach()]
        if backward:
            truth += torch.autograd.grad(out, wide, dout[few].double())
        names = ("out", "dq", "dk", "dv")
        found = [result[few] for result in results]
        return dict(zip(names, zip(found, truth, strict=True), strict=False))

    ours: dict[str, Callable[[], Results]] = {}
    for tiles in forms:
        if not backward:
            ours[str(tiles)] = partial(run, partial(attention.attention, tiles=tiles))
            continue
        for back in attention.BACKWARD:
            for one_pass in (False, True):
                name = f"gradients {back[1]}" if one_pass else f"gradients {back[0]}; {back[1]}"
                function = partial(attention.attention, tiles=tiles, back=back, one_pass=one_pass)
                ours[f"{name}, in {'one pass' if one_pass else 'two passes'}"] = partial(
                    run, function
                )
    useful = attention.flops(samples, heads, queries, keys, head_size)
    if backward:
        useful += attention.flops(samples, heads, queries, keys, head_size, backward=True)
    size = f"{samples} x {heads} x {queries} x {keys}, heads of {head_size}"
    return Case(
        name=f"attention, {size}{', and to q, k, v' if backward else ''}",
        dtype=dtype,
        rivals={name: partial(run, function) for name, function in BACKENDS.items()},
        ours=ours,
        exact=exact,
        needed=ATTENTION,
        flops=useful,
    )


def geglu_case(
    rows: int,
    inputs: int,
    outputs: int,
    *,
    device: torch.device,
    forms: tuple[geglu_product.Tiles, ...],
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = (torch.randn(2 * outputs, inputs, device=device) * (2 / inputs**0.5)).to(dtype)
    bias = torch.randn(2 * outputs, device=device).to(dtype)

    def exact(results: Results) -> dict[str, tuple[Tensor, Tensor]]:
        few = slice(-1024 * SLICE, None)
        a, gate = F.linear(x[few].double(), weight.double(), bias.double()).chunk(2, dim=-1)
        return {"y": (results[0][few], a * F.gelu(gate))}

    return Case(
        name=f"GEGLU in a product, {rows} x {inputs} x {outputs}",
        dtype=dtype,
        rivals={"product, ops.geglu": lambda: (ops.geglu(F.linear(x, weight, bias)),)},
        ours={
            str(tiles): lambda tiles=tiles: (  # type: ignore[misc]
                geglu_product.geglu_product(x, weight, bias, tiles),
            )
            for tiles in forms
        },
        exact=exact,
        needed=GEGLU,
        flops=2 * rows * inputs * 2 * outputs,
    )


Maker = Callable[[], Case]


def cases(device: torch.device) -> dict[str, Maker]:
    """Stable Diffusion 1.5 at 512 px with 32 rows, DiT-XL/2 at 256 px with 64, and half of the rows
    where a step is guided. What matters most comes first: each compiles kernels of two seconds.
    """
    forms = attention.FORWARD
    self40, self80, self72 = (8, 4096, 4096, 40), (8, 1024, 1024, 80), (16, 256, 256, 72)
    across = (8, 4096, 77, 40)
    attend_to = partial(attention_case, device=device)
    product = partial(geglu_case, device=device, forms=geglu_product.TILES)
    return {
        "attention 40": lambda: attend_to(32, *self40, forms=forms),
        "GEGLU 320": lambda: product(32 * 4096, 320, 1280),
        "attention 72": lambda: attend_to(64, *self72, forms=forms[:2]),
        "attention 40, gradients": lambda: attend_to(16, *self40, forms=forms[:1], backward=True),
        "attention 80": lambda: attend_to(32, *self80, forms=forms[:2]),
        "GEGLU 640": lambda: product(32 * 1024, 640, 2560),
        "GEGLU 1280": lambda: product(32 * 256, 1280, 5120),
        "attention 40, across": lambda: attend_to(32, *across, forms=forms[:1]),
        "attention 72, gradients": lambda: attend_to(32, *self72, forms=forms[:1], backward=True),
        "attention 80, gradients": lambda: attend_to(16, *self80, forms=forms[:1], backward=True),
    }


def odd_cases() -> dict[str, Maker]:
    """Sizes that fit no tile, and some that do, on a CPU in the interpreter."""
    made: dict[str, Maker] = {}
    two = attention.Tiles(64, 64, 4, 2)
    forms = (two, replace(two, whole="values"), replace(two, whole="all"))
    bf16 = partial(attention_case, device=CPU, forms=forms)
    fp16 = partial(bf16, dtype=torch.float16)
    for attend_to, head_size, samples, queries, keys in (
        (bf16, 40, 2, 64, 64),
        (bf16, 40, 2, 100, 77),
        (bf16, 40, 1, 257, 257),
        (bf16, 72, 2, 77, 100),
        (bf16, 80, 1, 128, 257),
        (fp16, 40, 2, 100, 77),
        (fp16, 72, 1, 100, 77),
    ):
        given = (samples, 2, queries, keys, head_size)
        kind = "fp16" if attend_to is fp16 else "bf16"
        name = f"attention {head_size}, {queries} x {keys}, {kind}"
        made[name] = partial(attend_to, *given)
        made[f"{name}, gradients"] = partial(attend_to, *given, forms=forms[:1], backward=True)
    tiles = (geglu_product.Tiles(64, 64, 64, 4, 3),)
    for rows, inputs, outputs in ((1, 64, 64), (77, 128, 128), (257, 320, 64)):
        for dtype in (torch.bfloat16, torch.float16):
            name = f"GEGLU {inputs}, {rows} x {outputs}, {str(dtype)[6:]}"
            made[name] = partial(
                geglu_case, rows, inputs, outputs, device=CPU, forms=tiles, dtype=dtype
            )
    return made


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN until something writes it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def errors(case: Case, call: Callable[[], Results]) -> dict[str, Error]:
    """How far each result of a call is from fp64."""
    with poisoned():
        results = call()
    found = {}
    for name, (result, truth) in case.exact(results).items():
        difference = result.detach().double() - truth
        found[name] = Error(
            float(difference.norm() / truth.norm()),
            float(difference.abs().max() / truth.abs().max()),
        )
    return found


def gate(case: Case) -> tuple[dict[str, dict[str, Error]], dict[str, str]]:
    """The errors of those of ours that are right, and what is wrong with the others: more than the
    dtype's rounding, or that they do not run.
    """
    right, wrong = {}, {}
    eps = torch.finfo(case.dtype).eps
    for variant, call in case.ours.items():
        try:
            found = errors(case, call)
        except Exception as error:  # a form that a GPU refuses leaves the others
            wrong[variant] = f"{type(error).__name__}: {str(error)[:500]}"
            continue
        # neither holds for NaN
        far = [name for name, e in found.items() if not (e.norm <= eps and e.largest <= 2 * eps)]
        if far:
            told = (f"{n} by {found[n].norm:.1e} and {found[n].largest:.1e}" for n in far)
            wrong[variant] = f"away from fp64, of the norm and of the largest: {', '.join(told)}"
        else:
            right[variant] = found
    return right, wrong


def runnable(case: Case) -> dict[str, Callable[[], Results]]:
    """The rivals that exist for this size and device."""
    found = {}
    for name, call in case.rivals.items():
        try:
            call()
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            print(f"{case.name}: {name}: {reason}", file=sys.stderr, flush=True)
        else:
            found[name] = call
    return found


def verdict(case: Case, times: dict[str, timing.Times]) -> Record:
    """The fastest rival, the fastest of ours, what it gains and whether that lets it in."""
    fastest = [
        min((name for name in names if name in times), key=lambda name: times[name].median)
        for names in (case.rivals, case.ours)
    ]
    rival, ours = fastest
    gain = times[rival].median / times[ours].median
    return {
        "fastest_rival": rival,
        "fastest": ours,
        "gain": gain,
        "needed": case.needed,
        "enters": gain >= case.needed,
    }


def measure(case: Case, rounds: int, device: torch.device) -> tuple[Record | None, dict[str, str]]:
    """A record, or None where nothing of ours is right; and what is wrong."""
    right, wrong = gate(case)
    if not right:
        return None, wrong
    calls = {**runnable(case), **{name: case.ours[name] for name in right}}
    replays = {name: timing.replayed(call) for name, call in calls.items()}
    way = "launched" if None in replays.values() else "replayed"
    if way == "replayed":
        calls = {name: replay for name, replay in replays.items() if replay is not None}
    times = timing.interleave(calls, rounds, device)
    if way == "replayed":
        times = {name: each.each(timing.REPLAYED) for name, each in times.items()}
    record = {
        "case": case.name,
        "way": way,
        "rounds": rounds,
        "seconds": {
            name: {"median": each.median, "minimum": each.minimum} for name, each in times.items()
        },
        "useful_flops": case.flops,
        "errors": {
            name: {part: error._asdict() for part, error in found.items()}
            for name, found in right.items()
        },
        **verdict(case, times),
        "wrong": wrong,
    }
    return record, wrong


HEADING = (
    "| case | variant | median ms | min ms | useful TFLOP/s | over the fastest rival |\n"
    "|---|---|---|---|---|---|"
)


def lines(record: Record) -> str:
    """A line for each variant, and one with what follows."""
    base = record["seconds"][record["fastest_rival"]]["median"]
    rows = []
    for name, seconds in record["seconds"].items():
        median = seconds["median"]
        rows.append(
            f"| {record['case']} | {name} | {median * 1e3:.4g} | {seconds['minimum'] * 1e3:.4g} | "
            f"{record['useful_flops'] / median / 1e12:.0f} | {base / median:.2f}x |"
        )
    word = "enters" if record["enters"] else "does not enter"
    rows.append(
        f"| {record['case']} | {word} | | | | {record['gain']:.2f}x, {record['needed']}x needed |"
    )
    return "\n".join(rows)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser("experiments", __doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--rounds", type=at_least(1), default=7, help="measurements of each variant (default 7)"
    )
    parser.add_argument(
        "--interpret", action="store_true", help="only compare, in Triton's interpreter on a CPU"
    )
    parser.add_argument(
        "--audit", action="store_true", help="only compile for an H100, and read the machine code"
    )
    add_device(parser)
    add_record(parser, "experiments")
    return parser.parse_args(arguments)


def chosen(makers: dict[str, Maker], only: str) -> dict[str, Maker]:
    found = {name: make for name, make in makers.items() if only in name}
    if not found:
        raise InputError(
            f"only = {only!r}: no case of experiments has it; there are: {'; '.join(makers)}"
        )
    return found


def interpreted(only: str) -> int:
    """Compares in a process of its own, since Triton decides once whether to interpret."""
    makers = chosen(odd_cases(), only)
    if not dispatch.INTERPRETED:
        same = command("benchmarks.run", "experiments", "--interpret", "--only", only)
        return subprocess.run(same, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    failed = False
    for name, make in makers.items():
        _, wrong = gate(make())
        _tell(name, wrong)
        print(f"{name}: {'wrong' if wrong else 'right'}", flush=True)
        failed |= bool(wrong)
    return 1 if failed else 0


def _tell(name: str, wrong: dict[str, str]) -> None:
    for variant, problem in wrong.items():
        print(f"{name}: {variant}: {problem}", file=sys.stderr, flush=True)


def audited() -> int:
    if reason := audit.missing():
        raise InputError(reason)
    print(machine_code.HEADING, flush=True)
    for variant in machine_code.variants():
        print(machine_code.line(audit.inspect(variant, 90)), flush=True)
    return 0


def run(makers: dict[str, Maker], rounds: int, device: torch.device, folder: Path | None) -> int:
    """Measures one case after the other and keeps each record as soon as it is there."""
    failed = False
    for name, make in makers.items():
        try:
            record, wrong = measure(make(), rounds, device)
        except Exception as error:  # a case that fails leaves the others
            record, wrong = None, {"all": f"{type(error).__name__}: {str(error)[:2000]}"}
        _tell(name, wrong)
        failed |= bool(wrong)
        if record is not None:
            print(lines(record), flush=True)
            if folder is not None:
                timing.append(folder / RECORDS.name, "experiments", [record], device)
        gc.collect()
        torch.cuda.empty_cache()
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where something is wrong. Raises ``InputError`` for times without a GPU."""
    options = _arguments(arguments)
    device = options.device
    if options.interpret:
        return interpreted(options.only)
    if options.audit:
        return audited()
    if device.type != "cuda":
        raise InputError(
            f"device = {str(device)!r}: the suite experiments needs a GPU; expected cuda, or "
            "--interpret or --audit"
        )
    print(HEADING, flush=True)
    return run(chosen(cases(device), options.only), options.rounds, device, options.record)
