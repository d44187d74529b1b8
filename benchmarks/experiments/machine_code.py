"""What the experiments become on an H100, read from their machine code by `dpfast.ops.audit`."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.experiments import attention, geglu_product
from dpfast.ops.audit import Report, Variant
from dpfast.ops.triton_stub import next_power

HEADING = (
    "| kernel | registers | spills, bytes | shared bytes | occupancy "
    "| operations of tensor cores | over useful ones | copies past registers |\n" + "|---" * 8 + "|"
)


def attention_variant(
    kernel: Any, head_size: int, tiles: attention.Tiles, **changes: Any
) -> Variant:
    """A kernel over whole blocks, in bf16, for eight heads."""
    wide, narrow = attention.lanes(head_size)
    one = next_power(head_size), 0
    scores = one if tiles.whole == "all" else (wide, narrow)
    values = one if tiles.whole else (wide, narrow)
    strides = [f"{letter}_{of}" for letter in "qkvd" for of in ("sample", "token")]
    given = {
        **dict.fromkeys(("q", "k", "v", "out", "dout", "dk", "dv"), "*bf16"),
        **{"dq": "*bf16" if kernel is attention.queries_kernel else None},
        **{"logs": None if kernel is attention.forward_kernel else "*fp32", "sums": "*fp32"},
        **dict.fromkeys((*strides, "queries", "keys"), "i32:16"),
        **{"factor": "fp32", "scale": "fp32", "H": 8, "D": head_size},
        **{"WIDE": scores[0], "NARROW": scores[1], "V_WIDE": values[0], "V_NARROW": values[1]},
        **{"M": tiles.queries, "N": tiles.keys, "EVEN": True, **changes},
    }
    one_pass = ", in one pass" if given["dq"] == "*fp32" else ""
    return Variant(
        name=f"{kernel.__name__}{one_pass}, heads of {head_size}, {tiles}",
        kernel=kernel,
        arguments={name: given[name] for name in kernel.arg_names},
        warps=tiles.warps,
        stages=tiles.stages,
        reads=0,
        writes=0,
    )


def geglu_variant(tiles: geglu_product.Tiles) -> Variant:
    given = {
        **dict.fromkeys(("x", "weight", "bias", "out"), "*bf16"),
        **dict.fromkeys(("rows", "C", "K"), "i32:16"),
        **{"M": tiles.rows, "N": tiles.columns, "STEP": tiles.inputs},
        "GROUP": geglu_product.GROUP,
    }
    return Variant(
        name=f"geglu_product_kernel, {tiles}",
        kernel=geglu_product.geglu_product_kernel,
        arguments=given,
        warps=tiles.warps,
        stages=tiles.stages,
        reads=0,
        writes=0,
    )


def variants() -> list[Variant]:
    """The kernels that a GPU would time."""
    found = []
    for head_size in (40, 72, 80):
        forms = attention.FORWARD if head_size == 40 else attention.FORWARD[:2]
        found += [attention_variant(attention.forward_kernel, head_size, tiles) for tiles in forms]
        for of_queries, of_keys in attention.BACKWARD:
            found += [
                attention_variant(attention.queries_kernel, head_size, of_queries),
                attention_variant(attention.keys_kernel, head_size, of_keys),
                attention_variant(attention.keys_kernel, head_size, of_keys, dq="*fp32"),
            ]
    return [*found, *map(geglu_variant, geglu_product.TILES)]


def operations(report: Report) -> int:
    """Of tensor cores, by the four warps of a group: in one turn of the kernel's loop, as its code
    stands once in the program.
    """
    sizes = re.findall(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", report.assembly)
    return sum(2 * int(m) * int(n) * int(k) for m, n, k in sizes)


def useful(variant: Variant) -> int:
    """Of `operations`, those that the result needs."""
    given = variant.arguments
    groups = variant.warps // 4
    if "STEP" in given:
        return 2 * 2 * given["M"] * given["N"] * given["STEP"] // groups
    products = {"forward_kernel": 2, "queries_kernel": 3, "keys_kernel": 4}
    count = products[variant.kernel.__name__] + (given.get("dq") == "*fp32")
    return 2 * count * given["M"] * given["N"] * given["D"] // groups


def copies(report: Report) -> dict[str, int]:
    """Widths in bytes of the copies to shared memory that pass no register, and how many there
    are in the program.
    """
    found: dict[str, int] = {}
    for suffixes in re.findall(r"\bLDGSTS((?:\.\w+)*)", report.assembly):
        bits = next((part for part in suffixes.split(".") if part in ("64", "128")), "32")
        found[bits] = found.get(bits, 0) + 1
    return {str(int(bits) // 8): count for bits, count in sorted(found.items())}


def line(report: Report) -> str:
    work = operations(report)
    moved = " + ".join(f"{count} x {width} B" for width, count in copies(report).items())
    return (
        f"| {report.variant.name} | {report.registers} | {report.local_bytes} | "
        f"{report.shared_bytes} | {report.occupancy:.0%} | {work} | "
        f"{work / useful(report.variant):.2f} | {moved} |"
    )
