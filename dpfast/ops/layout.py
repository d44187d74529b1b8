"""Images with channels next to each other in memory (NHWC, channels_last), which kernels read."""

from __future__ import annotations

from torch import Tensor


def nhwc(x: Tensor) -> Tensor:
    """Returns x (B, C, ...) in channels_last memory: itself where it lies there, else a copy."""
    rows = x.movedim(1, -1)
    return x if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def nhwc_like(x: Tensor, channels: int) -> Tensor:
    """Returns new channels_last memory (B, channels, ...) for a tensor as x (B, C, ...), in its
    dtype.
    """
    return x.new_empty((len(x), *x.shape[2:], channels)).movedim(-1, 1)
