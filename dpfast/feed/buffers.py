"""Buffers that are used again: a large batch in new memory costs more in page faults than in
arithmetic.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from torch import Tensor

from dpfast.pool.batch import BatchFormat
from dpfast.pool.memory_tiers import host_memory


class BufferPool:
    """Host buffers, each used again as soon as nobody refers to what lies in it.

    A tensor over a NumPy array keeps the array alive, and so does every view of it and every graph
    that saved it: the array's reference count says whether a buffer is free. So a batch is never
    overwritten while somebody holds it. Who reads a buffer without referring to it (DALI with
    ``no_copy``) holds the array for as long as the reading lasts.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._size = 0

    def __len__(self) -> int:
        return len(self._arrays)

    def take(self, size: int) -> np.ndarray:
        """Returns (n,) uint8, at least ``size``, its contents undefined: one that is free, or a new
        one.
        """
        if size > self._size:
            self._arrays = []
            self._size = size
        for position in range(len(self._arrays)):
            if _references(self._arrays, position) == _FREE:
                return self._arrays[position]
        # not a slice: its views would refer to what it was cut from
        self._arrays.append(host_memory(self._size).numpy())
        return self._arrays[-1]

    def batch(self, shape: tuple[int, int, int, int], form: BatchFormat) -> Tensor:
        """Returns (B, C, H, W) over a buffer, undefined, in the dtype and layout of ``form``."""
        count, channels, height, width = shape
        size = math.prod(shape) * form.dtype.itemsize
        flat = torch.from_numpy(self.take(size))[:size].view(form.dtype)
        if form.channels_last:
            return flat.view(count, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(shape)


def _references(arrays: list[np.ndarray], position: int) -> int:
    return sys.getrefcount(arrays[position])


# of an array that only its list holds; it differs between versions of Python
_FREE = _references([np.empty(0)], 0)
