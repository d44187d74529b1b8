"""`normal` in plain PyTorch; the formula stands in dpfast/ops/noise.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Philox4x32-10 of broadcastable int64 words in [0, 2^32): four int64 tensors of words.

    The product of two words wraps around in int64, which keeps all of its 64 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (high >> 32 & WORD) ^ c1 ^ k0, high & WORD
        c2, c3 = (low >> 32 & WORD) ^ c3 ^ k1, low & WORD
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return c0, c1, c2, c3


def reference_words(
    sample_ids: Tensor, elements: int, seed: int | Tensor, stream: int | Tensor
) -> Tensor:
    """The words of `elements` elements for each sample: (B, ceil(elements / 4), 4) int64 in [0,
    2^32).
    """
    device = sample_ids.device
    # int64 holds a seed's bits as two's complement, so seeds from 2^63 to 2^64 - 1 fold to the
    # negative numbers.
    seed = (
        seed
        if isinstance(seed, Tensor)
        else torch.full((), signed(seed), dtype=torch.int64, device=device)
    )
    stream = (
        stream
        if isinstance(stream, Tensor)
        else torch.full((), stream, dtype=torch.int64, device=device)
    )
    seed, stream = seed.long(), stream.long() & WORD
    ids = sample_ids.unsqueeze(1)
    block = torch.arange((elements + 3) // 4, device=device).unsqueeze(0)
    counter = (ids & WORD, ids >> 32 & WORD, block, seed >> 32 & WORD)
    words = philox(counter, (seed & WORD, stream))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def reference(
    sample_ids: Tensor, shape: tuple[int, ...], seed: int | Tensor, stream: int | Tensor
) -> Tensor:
    """The formula in plain PyTorch, with Box-Muller in fp64: (B, *shape) fp32."""
    elements = math.prod(shape)
    words = reference_words(sample_ids, elements, seed, stream)
    u = words[..., 0::2].float() * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2.0 * torch.log(u.double()))
    angle = words[..., 1::2].double() * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    flat = pairs.reshape(sample_ids.shape[0], (elements + 3) // 4 * 4)[:, :elements]
    return flat.float().reshape(sample_ids.shape[0], *shape)


def signed(seed: int) -> int:
    """The int64 with the bits of a 64-bit seed."""
    return (seed + 2**63) % 2**64 - 2**63
