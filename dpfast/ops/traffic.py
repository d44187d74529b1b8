"""What an operation of this package launches on a GPU and moves there: the formulas that counters
read.

A counter of torch's operations sees one of ours as one call, and nothing inside of it. Here each
says how many kernels it launches and how many bytes each of them reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# called with the operation's arguments and, as ``out``, its result: bytes of each kernel
Formula = Callable[..., Sequence[int]]

FORMULAS: dict[Any, Formula] = {}


def register_traffic(operation: Any) -> Callable[[Formula], Formula]:
    """Registers the formula of ``torch.ops.dpfast.NAME`` behind it, as a decorator."""

    def register(formula: Formula) -> Formula:
        FORMULAS[operation] = formula
        return formula

    return register
