"""The launches and bytes of each operation on a GPU: the formulas that counters read.

A counter of torch's operations sees one of ours as one call, and nothing inside of it. Here each
says how many kernels it launches, how many bytes each of them reads and writes, and whether they
are products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

# called with the operation's arguments and, as ``out``, its result: bytes of each kernel
Formula = Callable[..., Sequence[int]]
Kind = Literal["product", "pointwise"]

FORMULAS: dict[Any, tuple[Kind, Formula]] = {}


def register_traffic(operation: Any, kind: Kind = "pointwise") -> Callable[[Formula], Formula]:
    """Registers the formula of ``torch.ops.dpfast.NAME`` behind it, as a decorator; kind: of its
    kernels.
    """

    def register(formula: Formula) -> Formula:
        FORMULAS[operation] = (kind, formula)
        return formula

    return register
