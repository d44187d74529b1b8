"""What Inductor generates for the operations on an H100, beside the kernels of dpfast; needs no
GPU.

    python -m benchmarks.systems.inductor_comparison --helper lower.py --out
    benchmarks/results/inductor_offline.jsonl

`--helper` is a Python file with a function `lower(function, arguments)` that lowers a function of
CPU tensors with Inductor for an H100 and returns an object with `kernels` (names of the Triton
launches), `externs` (library call -> count) and `code` (the generated module). Needs a CUDA build
of torch.

Bytes: each load or store in a generated kernel counts the smaller of its tensor and the kernel's
iteration space. A loop that reads a tensor again counts again, although the L2 cache may hold a
short one; so it does for dpfast, whose kernels the audit proves to move the bytes of the formula.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpfast.cli.parser import Parser, in_one_line
from dpfast.ops import gather, noise
from dpfast.ops.entropy import ONE_BLOCK
from dpfast.ops.entropy import reference as entropy_reference
from dpfast.ops.guided_step.reference import Call, Options
from dpfast.ops.guided_step.reference import reference as guided_reference

SIZES = {
    "fp64": 8,
    "i64": 8,
    "u64": 8,
    "fp32": 4,
    "i32": 4,
    "u32": 4,
    "fp16": 2,
    "bf16": 2,
    "u8": 1,
    "i8": 1,
    "i1": 1,
}


@dataclass(frozen=True)
class Subject:
    """An operation at one size: the function for Inductor, its arguments, and the bytes of dpfast's
    one launch.
    """

    operation: str
    source: str
    size: str
    function: Callable[..., Any]
    arguments: list[Tensor]
    bytes: int


def textbook(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and gradient as they are usually written."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    values = -(p * log_p).sum(dim=-1)
    return values, (-p * (log_p + values[:, None])).to(logits.dtype)


def _entropy(rows: int, classes: int, dtype: torch.dtype) -> list[Subject]:
    logits = torch.empty(rows, classes, dtype=dtype)
    passes = 2 if classes <= ONE_BLOCK else 3  # a longer row is read twice
    moved = passes * logits.numel() * logits.element_size() + 4 * rows
    size = f"{rows} x {classes} {_short(dtype)}"
    reference = Subject(
        "entropy_and_grad", "reference", size, lambda z: entropy_reference(z, 1.0), [logits], moved
    )
    return [reference, Subject("entropy_and_grad", "log_softmax", size, textbook, [logits], moved)]


def _guided(
    name: str, dtype: torch.dtype, noisy: bool = False, clip: float | None = None
) -> Subject:
    shape = (256, 4, 64, 64)
    inputs = [torch.empty(shape, dtype=dtype) for _ in range(4)]
    scalars = [
        torch.empty(50, 6),
        torch.empty((), dtype=torch.int64),
        torch.empty(()),
        torch.empty(()),
    ]
    ids = torch.empty(shape[0], dtype=torch.int64)

    options = Options("relative", "epsilon", math.inf if clip is None else clip, -1.0, 1.0)

    def step(*given: Tensor) -> Tensor:
        x, cond, uncond, grad, *coefficients = given[:8]
        key = given[8] if noisy else None
        return guided_reference(
            Call(x, None, None, x, cond, uncond, grad, None, *coefficients, options, key, 0)
        )[0]  # type: ignore[arg-type]

    moved = 5 * inputs[0].numel() * inputs[0].element_size() + noisy * 8 * shape[0]
    size = f"{shape[0]} x 4x64x64 {_short(dtype)}"
    arguments = [*inputs, *scalars, *([ids] if noisy else [])]
    return Subject(f"guided_step, CFG, relative, {name}", "reference", size, step, arguments, moved)


def _normal() -> Subject:
    ids = torch.empty(256, dtype=torch.int64)
    moved = 256 * (4 * 16384 + 8)
    return Subject(
        "normal",
        "reference",
        "256 x 4x64x64",
        lambda i: noise.reference(i, (4, 64, 64), 0, 1),
        [ids],
        moved,
    )


def _gather(dtype: torch.dtype) -> Subject:
    store = torch.empty(100_000, 3, 64, 64, dtype=torch.uint8)
    indices, flip = torch.empty(1024, dtype=torch.int64), torch.empty(1024, dtype=torch.bool)
    scale, bias = torch.empty(3), torch.empty(3)

    def batch(*given: Tensor) -> Tensor:
        pixels = gather.reference(gather.Request(*given)).to(dtype)
        return pixels.contiguous(memory_format=torch.channels_last)

    moved = 1024 * (3 * 64 * 64 * (1 + dtype.itemsize) + 9)
    size = f"1024 of 100000 x 3x64x64 uint8 -> NHWC {_short(dtype)}"
    return Subject(
        "gather_batch, flip", "reference", size, batch, [store, indices, flip, scale, bias], moved
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def subjects() -> list[Subject]:
    """The comparison's rows."""
    fp32, bf16 = torch.float32, torch.bfloat16
    return [
        *(subject for dtype in (fp32, bf16) for subject in _entropy(1024, 1000, dtype)),
        *(subject for dtype in (fp32, bf16) for subject in _entropy(64, 128256, dtype)),
        _guided("eta 0", fp32),
        _guided("eta 0", bf16),
        _guided("eta 0, clip", fp32, clip=1.0),
        _guided("eta 1 with noise", fp32, noisy=True),
        _normal(),
        _gather(bf16),
    ]


def _product(dimensions: str) -> int:
    return math.prod(int(number) for number in re.findall(r"\d+", dimensions))


def traffic(code: str) -> int:
    """The bytes that a module of Inductor's moves in its Triton kernels."""
    shapes = re.findall(
        r"(\w+) = (?:rand_strided|empty_strided_cuda|reinterpret_tensor)\((?:\w+, )?\(([^)]*)\)",
        code,
    )
    # results of library calls, of which the code asserts the shape
    shapes += re.findall(r"assert_size_stride\((\w+), \(([^)]*)\)", code)
    elements = {
        name: _product(shape) for name, shape in shapes
    }  # the product of no dimensions is one element
    body = code[code.rfind("def call(") :]
    for new, old in re.findall(
        r"^ *(\w+) = (\w+)(?:; del \2)?  # (?:reuse|alias)", body, re.MULTILINE
    ):
        elements[new] = elements[old]
    total = 0
    for name, given in re.findall(r"(triton_\w+)\.run\((.*), stream=", body):
        given = re.sub(r"reinterpret_tensor\((\w+), [^)]*\)[^)]*\)[^)]*\)", r"\1", given)
        values = [value.strip() for value in given.split(",")]
        kernel = re.search(rf"def {name}\((.*?)\):\n(.*?)\n'''", code, re.DOTALL)
        types = re.findall(r"signature': \{(.*?)\}", code[: kernel.start()] if kernel else "")
        if kernel is None or not types:
            raise ValueError(f"{name} has no definition in the generated code")
        signature = dict(re.findall(r"'(\w+)': '([^']*)'", types[-1]))
        parameters = [parameter.split(":")[0].strip() for parameter in kernel[1].split(",")]
        arguments = dict(zip(parameters, values, strict=False))
        space = math.prod(
            int(size) for size in re.findall(r"^    \w*numel = (\d+)$", kernel[2], re.MULTILINE)
        )
        for pointer in re.findall(r"tl\.(?:load|store|atomic_\w+)\((\w+)", kernel[2]):
            total += min(elements[arguments[pointer]], space) * SIZES[signature[pointer][1:]]
    return total


def _helper(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("helper", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["helper"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--helper", type=Path, required=True, help="file with the function lower")
    parser.add_argument("--out", type=Path, required=True, help="one JSON object a line")
    parser.add_argument("--code", type=Path, help="folder for the generated modules")
    arguments = parser.parse_args()
    lower = _helper(arguments.helper).lower
    print(
        "| operation | size | written as | Inductor: launches "
        "| Inductor: MB | dpfast: launches | dpfast: MB |"
    )
    print("|---|---|---|---|---|---|---|")
    lines = []
    for number, subject in enumerate(subjects()):
        torch._dynamo.reset()
        report = lower(subject.function, subject.arguments)
        launches, moved = len(report.kernels) + sum(report.externs.values()), traffic(report.code)
        if arguments.code is not None:
            (arguments.code / f"{number}.py").write_text(report.code, encoding="utf-8")
        lines.append(
            {
                "operation": subject.operation,
                "size": subject.size,
                "source": subject.source,
                "torch": torch.__version__,
                "gpu": "sm_90",
                "inductor": {
                    "triton": report.kernels,
                    "library": report.externs,
                    "launches": launches,
                    "bytes": moved,
                },
                "dpfast": {"launches": 1, "bytes": subject.bytes},
            }
        )
        print(
            f"| {subject.operation} | {subject.size} | {subject.source} | {launches} | "
            f"{moved / 1e6:.2f} | 1 | "
            f"{subject.bytes / 1e6:.2f} |"
        )
    arguments.out.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(in_one_line("inductor_comparison", main))
