"""Triton where it is installed; elsewhere stand-ins that let the kernels be defined, though never
launched.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:

    def _jit(function: Any = None, **options: Any) -> Any:
        return function if function is not None else _jit

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["next_power", "tl", "triton"]


def next_power(number: int) -> int:
    """Returns the smallest power of two that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()
