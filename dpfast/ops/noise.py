"""Normal noise that depends on the sample's id alone, never on the batch, the rank or the device.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key
and a counter into four words of 32 bits, one block for four consecutive elements of a sample:

    key     = (seed's low word, stream)
    counter = (id's low word, id's high word, element // 4, seed's high word)

Box-Muller makes normals from the words in pairs, (w0, w1) and (w2, w3):

    u = (w0 + 1/2) / 2^32 in fp32,   radius = sqrt(-2 log u),   angle = 2 pi w1 / 2^32
    z0, z1 = radius * (cos, sin)(angle)

The words are bit-identical everywhere, the normals agree to a few ulp. Bytes: 4 a normal, written
once.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.triton_stub import next_power, tl, triton

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
BLOCK = 1024  # elements of a program


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Computes Philox4x32-10 of broadcastable int64 words in [0, 2^32): four int64 tensors of
    words.

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
    """Returns the words of `elements` elements for each sample: (B, ceil(elements / 4), 4) int64 in
    [0, 2^32).
    """
    device = sample_ids.device
    # int64 holds a seed's bits as two's complement, so seeds from 2^63 to 2^64 - 1 fold to the
    # negative numbers.
    if not isinstance(seed, Tensor):
        seed = torch.full((), signed(seed), dtype=torch.int64, device=device)
    if not isinstance(stream, Tensor):
        stream = torch.full((), stream, dtype=torch.int64, device=device)
    seed = seed.long()
    stream = stream.long() & WORD
    ids = sample_ids.unsqueeze(1)
    block = torch.arange((elements + 3) // 4, device=device).unsqueeze(0)
    counter = (ids & WORD, ids >> 32 & WORD, block, seed >> 32 & WORD)
    words = philox(counter, (seed & WORD, stream))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def reference(
    sample_ids: Tensor, shape: tuple[int, ...], seed: int | Tensor, stream: int | Tensor
) -> Tensor:
    """Returns the formula in plain PyTorch, with Box-Muller in fp64: (B, *shape) fp32."""
    elements = math.prod(shape)
    words = reference_words(sample_ids, elements, seed, stream)
    u = words[..., 0::2].float() * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2.0 * torch.log(u.double()))
    angle = words[..., 1::2].double() * (2.0 * math.pi * 2.0**-32)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    flat = pairs.reshape(sample_ids.shape[0], (elements + 3) // 4 * 4)[:, :elements]
    return flat.float().reshape(sample_ids.shape[0], *shape)


def signed(seed: int) -> int:
    """Returns the int64 with the bits of a 64-bit seed."""
    return (seed + 2**63) % 2**64 - 2**63


@triton.jit
def philox_words(sample, block, seed, stream):
    """Returns the four words of each counter, as `philox`: `block` is a tensor of block indices,
    the rest are int64 scalars.
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
    """Returns log(u) of normal u > 0 to an ulp also next to 1, where the hardware's is not; fits as
    in csrc/simd.hpp.
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
    """Returns two normals from two words. The library's sine keeps a table in local memory for
    angles that never occur here.
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
    """Returns a seed as int64. A sum, not a cast: the interpreter keeps a number from 2^31 on in 32
    bits and calls it 64.
    """
    return seed + tl.zeros((), tl.int64)


@triton.jit
def normals(sample, first, seed, stream, BLOCK: tl.constexpr):
    """Returns BLOCK normals of one sample from element `first` on, a multiple of 4."""
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
    """Writes BLOCK elements of one sample a program. SEED_AT and STREAM_AT: the argument is a
    pointer instead of a number.
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
    """Returns the normals (B, elements), or the words themselves (B, ceil(elements / 4), 4) as
    int32 bits.
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


def _native(
    sample_ids: Tensor, elements: int, seed: int | Tensor, stream: int | Tensor, words: bool = False
) -> Tensor:
    """Returns the normals (B, elements), or the words themselves (B, ceil(elements / 4), 4) as
    int32 bits.
    """
    samples = sample_ids.shape[0]
    blocks = (samples, (elements + 3) // 4, 4)
    if words:
        out = torch.empty(blocks, dtype=torch.int32)
    else:
        out = torch.empty(samples, elements, dtype=torch.float32)
    seed_at = seed.long() if isinstance(seed, Tensor) else None
    stream_at = stream.long() if isinstance(stream, Tensor) else None
    ids = sample_ids.contiguous()
    dispatch.native_module().noise(
        ids.data_ptr(),
        samples,
        elements,
        0 if isinstance(seed, Tensor) else seed,
        dispatch.address(seed_at),
        0 if isinstance(stream, Tensor) else stream,
        dispatch.address(stream_at),
        0 if words else out.data_ptr(),
        out.data_ptr() if words else 0,
        torch.get_num_threads(),
    )
    return out


def words(sample_ids: Tensor, elements: int, *, seed: int, stream: int) -> Tensor:
    """Returns the words behind `normal`: (B, ceil(elements / 4), 4) int64 in [0, 2^32), the same on
    every backend.
    """
    backend = dispatch.backend_for(sample_ids.device)
    if backend == "triton":
        return launch(sample_ids, elements, seed, stream, words=True).long() & WORD
    if backend == "native":
        return _native(sample_ids, elements, seed, stream, words=True).long() & WORD
    return reference_words(sample_ids, elements, seed, stream)


def _run(
    sample_ids: Tensor, shape: Sequence[int], seed: int | Tensor, stream: int | Tensor
) -> Tensor:
    backend = dispatch.backend_for(sample_ids.device)
    if backend == "triton":
        normals = launch(sample_ids, math.prod(shape), seed, stream)
    elif backend == "native":
        normals = _native(sample_ids, math.prod(shape), seed, stream)
    else:
        return reference(sample_ids, tuple(shape), seed, stream)
    return normals.reshape(sample_ids.shape[0], *shape)


@torch.library.custom_op("dpfast::normal", mutates_args=())
def _operation(
    sample_ids: Tensor,
    shape: Sequence[int],
    seed: int,
    seed_at: Tensor | None,
    stream: int,
    stream_at: Tensor | None,
) -> Tensor:
    return _run(
        sample_ids,
        shape,
        seed if seed_at is None else seed_at,
        stream if stream_at is None else stream_at,
    )


@_operation.register_fake
def _(
    sample_ids: Tensor,
    shape: Sequence[int],
    seed: int,
    seed_at: Tensor | None,
    stream: int,
    stream_at: Tensor | None,
) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], *shape), dtype=torch.float32)


def check_seed(name: str, seed: int | Tensor, device: torch.device) -> int | Tensor:
    """Returns a seed or stream: any 64-bit integer, signed or not, or a 0-d integer tensor;
    integers come back signed.
    """
    value = check.integer(name, seed, device)
    if isinstance(value, Tensor):
        return value
    if not -(2**63) <= value < 2**64:
        raise InputError(f"{name} must fit into 64 bits, got {value}")
    return signed(value)


def normal(
    sample_ids: Tensor, shape: Sequence[int], *, seed: int | Tensor, stream: int | Tensor
) -> Tensor:
    """Draws standard normals, one stream of them for each sample id.

    The generator is Philox4x32-10 (Salmon et al., SC 2011) with the transform of Box and Muller
    (1958).

    Args:
        sample_ids: (B,) int64; a sample keeps its noise in any batch, order or device.
        shape: Shape of one sample, at most 2^34 elements.
        seed: 64-bit integer or 0-d integer tensor on the same device.
        stream: Number of an independent draw for the same seed and id; its low 32 bits count.
            Integer or 0-d tensor.

    Returns:
        (B, *shape) fp32 on the device of ``sample_ids``.

    Raises:
        InputError: For a wrong shape, device or range.
        TypeError: For a wrong type or dtype.

    Examples:
        >>> import torch, dpfast
        >>> noise = dpfast.normal(torch.tensor([3, 7]), (2,), seed=0, stream=0)
        >>> torch.equal(noise[1:], dpfast.normal(torch.tensor([7]), (2,), seed=0, stream=0))
        True
    """
    check.tensor("sample_ids", sample_ids, (torch.int64,))
    if sample_ids.dim() != 1:
        raise InputError(f"sample_ids has shape {tuple(sample_ids.shape)}, expected (B,)")
    if not isinstance(shape, (tuple, list)) or not all(
        isinstance(n, (Integral, torch.SymInt)) for n in shape
    ):
        raise TypeError(f"shape must be a tuple or list of integers, got {shape!r}")
    size = tuple(shape)
    if any(isinstance(n, bool) or n < 0 for n in size) or math.prod(size) > 2**34:
        raise InputError(
            f"shape must hold non-negative integers and at most 2^34 elements, got {size}"
        )
    seed = check_seed("seed", seed, sample_ids.device)
    stream = check_seed("stream", stream, sample_ids.device)
    if dispatch.traced(sample_ids):
        return _operation(
            sample_ids,
            size,
            *dispatch.integer_or_tensor(seed),
            *dispatch.integer_or_tensor(stream),
        )
    return _run(sample_ids, size, seed, stream)
