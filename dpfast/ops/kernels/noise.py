"""The Triton kernel of `normal`, and its normals for kernels that add noise of their own."""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfast.ops.triton_stub import next_power, tl, triton

BLOCK = 1024  # elements of a program


@triton.jit
def philox_words(sample, block, seed, stream):
    """The four words of each counter, as `philox`: `block` is a tensor of block indices, the rest
    are int64 scalars.
    """
    c0 = (sample & 0xFFFFFFFF).to(tl.uint32) + block * 0
    c1 = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32) + block * 0
    c2 = block
    c3 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32) + block * 0
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (stream & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        low, high = c0, c2
        c0 = tl.umulhi(high, tl.full((), 0xCD9E8D57, tl.uint32)) ^ c1 ^ k0
        c2 = tl.umulhi(low, tl.full((), 0xD2511F53, tl.uint32)) ^ c3 ^ k1
        c1 = high * tl.full((), 0xCD9E8D57, tl.uint32)
        c3 = low * tl.full((), 0xD2511F53, tl.uint32)
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _logarithm(u):
    """log(u) of normal u > 0 to an ulp also next to 1, where the hardware's is not; fits as in
    csrc/simd.hpp.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the mantissa lands in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.0763449743390 + 0.1276158243418
    p = p * f - 0.1316018402576
    p = p * f + 0.1420175731182
    p = p * f - 0.1662335693836
    p = p * f + 0.2000122666359
    p = p * f - 0.2500081956387
    p = p * f + 0.3333333134651
    square = f * f
    return (f + (p * (f * square) - 0.5 * square)) + exponent.to(tl.float32) * 0.693147180559945


@triton.jit
def _box_muller(word, turn):
    """Two normals from two words. The library's sine keeps a table in local memory for angles that
    never occur here.
    """
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    radius = tl.sqrt(-2.0 * _logarithm(u))
    quarter = (turn + 0x20000000) >> 30
    t = (turn - (quarter << 30)).to(tl.int32, bitcast=True).to(
        tl.float32
    ) * 1.46291807926716e-9  # (pi / 2) / 2^30
    square = t * t
    s = (square * -0.000195152824745 + 0.008332160301507) * square - 0.166666552424431
    s = s * (square * t) + t
    c = (square * 0.000024433195567 - 0.001388731645420) * square + 0.041666645556688
    c = c * (square * square) - 0.5 * square + 1.0
    odd = (quarter & 1) == 1
    cosine = tl.where(((quarter + 1) & 2) == 2, -1.0, 1.0) * tl.where(odd, s, c)
    sine = tl.where((quarter & 2) == 2, -1.0, 1.0) * tl.where(odd, c, s)
    return radius * cosine, radius * sine


@triton.jit
def wide(seed):
    """A seed as int64. A sum, not a cast: the interpreter keeps a number from 2^31 on in 32 bits
    and calls it 64.
    """
    return seed + tl.zeros((), tl.int64)


@triton.jit
def normals(sample, first, seed, stream, BLOCK: tl.constexpr):
    """BLOCK normals of one sample from element `first` on, a multiple of 4."""
    block = (first // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(sample, block, seed, stream)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit(do_not_specialize=["seed", "stream"])
def normal_kernel(
    ids,
    out,
    seed,
    stream,
    ELEMENTS: tl.constexpr,
    SEED_AT: tl.constexpr,
    STREAM_AT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one sample a program. SEED_AT and STREAM_AT: the argument is a pointer
    instead of a number.
    """
    # One axis of the grid for both: the second one ends at 65,535, which is 2^26 elements of a
    # sample.
    PROGRAMS: tl.constexpr = (ELEMENTS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    first = (tl.program_id(0) % PROGRAMS).to(tl.int64) * BLOCK
    sample = tl.load(ids + row)
    seed = wide(tl.load(seed) if SEED_AT else seed)
    stream = (tl.load(stream) if STREAM_AT else stream).to(tl.int64)
    if WORDS:
        block = (first // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
        w0, w1, w2, w3 = philox_words(sample, block, seed, stream)
        z = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int32, bitcast=True)
    else:
        z = normals(sample, first, seed, stream, BLOCK)
    element = first + tl.arange(0, BLOCK)
    tl.store(out + row * ELEMENTS + element, z, mask=element < ELEMENTS)


def launch(
    sample_ids: Tensor, elements: int, seed: int | Tensor, stream: int | Tensor, words: bool = False
) -> Tensor:
    """The normals (B, elements), or the words themselves (B, ceil(elements / 4), 4) as int32
    bits.
    """
    samples = sample_ids.shape[0]
    shape = (samples, (elements + 3) // 4, 4) if words else (samples, elements)
    out = torch.empty(
        shape, dtype=torch.int32 if words else torch.float32, device=sample_ids.device
    )
    if out.numel() == 0:
        return out
    width = math.prod(shape[1:])
    block = min(max(next_power(width), 16), BLOCK)
    normal_kernel[(samples * -(-width // block),)](
        sample_ids.contiguous(),
        out,
        seed,
        stream,
        width,
        isinstance(seed, Tensor),
        isinstance(stream, Tensor),
        words,
        block,
        num_warps=max(1, block // 256),
    )
    return out
