"""A keyed permutation of [0, n) whose values are computed where they are needed.

No list of indices exists anywhere: the value at place p is a function of (seed, epoch, stream, p,
n). A Feistel network permutes b bits, 2^b the smallest power of two that is not below max(n, 64),
and a value outside [0, n) goes through it again until it falls inside (cycle walking: Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002; less than two passes on average where
n > 32). The value is split into floor(b/2) left and ceil(b/2) right bits:

    left  ^= mix(right ^ key[2 i])         i = 0..3, each cut to the bits of its half
    right ^= mix(left ^ key[2 i + 1])

``mix`` is the 32-bit finaliser of MurmurHash3. The eight keys are the first eight Philox words
(``dpfast.ops.noise``) of sample id = epoch under (seed, stream). Integers only: the same on every
machine. Bytes: 8 a value, written once.

Places are drawn on the host, so there is no Triton kernel; numbers come in and no tensor, so there
is nothing to register with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import dispatch
from dpfast.ops.noise import reference_words

ROUNDS = 8
WORD = 0xFFFFFFFF
# Below, eight rounds do not reach all orders equally often: 5 values in 3 bits fail a chi-square.
SMALLEST_BITS = 6
LARGEST = 1 << 62


def reference(places: Tensor, size: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """Returns the formula in plain PyTorch, for any int64 ``places`` in [0, size), on any
    device.
    """
    words = reference_words(torch.tensor([epoch]), ROUNDS, seed, stream)
    keys: list[int] = words.flatten().tolist()
    bits = max((size - 1).bit_length(), SMALLEST_BITS)
    values = _network(places, keys, bits // 2, bits - bits // 2)
    while bool((outside := values >= size).any()):
        values[outside] = _network(values[outside], keys, bits // 2, bits - bits // 2)
    return values


def _network(values: Tensor, keys: Sequence[int], left_bits: int, right_bits: int) -> Tensor:
    left = values >> right_bits
    right = values & ((1 << right_bits) - 1)
    for first, second in zip(keys[0::2], keys[1::2], strict=True):
        left = left ^ _mix(right ^ first) & ((1 << left_bits) - 1)
        right = right ^ _mix(left ^ second) & ((1 << right_bits) - 1)
    return left << right_bits | right


def _mix(x: Tensor) -> Tensor:
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & WORD
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & WORD
    return x ^ x >> 16


def permutation(first: int, count: int, size: int, *, seed: int, epoch: int, stream: int) -> Tensor:
    """Returns the values at places ``first`` to ``first + count`` of a permutation of [0, size).

    Source: Black and Rogaway, CT-RSA 2002 (cycle walking).

    Args:
        first: First place, at least 0.
        count: Number of places; first + count <= size.
        size: Length of the permutation, at most 2^62.
        seed: 64-bit integer.
        epoch: 64-bit integer; each pair with a seed is a permutation of its own.
        stream: Number of an independent permutation for the same seed and epoch; its low 32 bits
            count.

    Returns:
        (count,) int64 on the CPU, the same integers on every backend.

    Raises:
        InputError: For places outside [0, size), and a size above 2^62.

    Examples:
        >>> from dpfast.ops import permutation
        >>> permutation(0, 5, 5, seed=0, epoch=0, stream=0).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    if not 0 <= first <= first + count <= size <= LARGEST:
        raise InputError(
            f"places {first} to {first + count} of {size} samples: "
            "expected 0 <= first <= last <= size"
        )
    if dispatch.backend_for(dispatch.CPU) != "native":
        places = torch.arange(first, first + count)
        return reference(places, size, seed=seed, epoch=epoch, stream=stream)
    out = torch.empty(count, dtype=torch.int64)
    dispatch.native_module().permutation(
        first, count, size, seed, epoch, stream, out.data_ptr(), torch.get_num_threads()
    )
    return out
