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

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.kernels.noise import launch
from dpfast.ops.reference.noise import WORD, reference, reference_words, signed


def _native(
    sample_ids: Tensor, elements: int, seed: int | Tensor, stream: int | Tensor, words: bool = False
) -> Tensor:
    """The normals (B, elements), or the words themselves (B, ceil(elements / 4), 4) as int32
    bits.
    """
    samples = sample_ids.shape[0]
    blocks = (samples, (elements + 3) // 4, 4)
    out = (
        torch.empty(blocks, dtype=torch.int32)
        if words
        else torch.empty(samples, elements, dtype=torch.float32)
    )
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
    """The words behind `normal`: (B, ceil(elements / 4), 4) int64 in [0, 2^32), the same on every
    backend.
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
        return launch(sample_ids, math.prod(shape), seed, stream).reshape(
            sample_ids.shape[0], *shape
        )
    if backend == "native":
        return _native(sample_ids, math.prod(shape), seed, stream).reshape(
            sample_ids.shape[0], *shape
        )
    return reference(sample_ids, tuple(shape), seed, stream)


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


def split(value: int | Tensor) -> tuple[int, Tensor | None]:
    """A number or a device scalar as the pair that a registered operation takes."""
    return (0, value) if isinstance(value, Tensor) else (value, None)


def check_seed(name: str, seed: int | Tensor, device: torch.device) -> int | Tensor:
    """A seed or stream: any 64-bit integer, signed or not, or a 0-d integer tensor; integers come
    back signed.
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
    """Standard normals, one stream of them for each sample id: (B, *shape) fp32 on the device of
    `sample_ids`.

    Args:
        sample_ids: (B,) int64; a sample keeps its noise in any batch, order or device.
        shape: the shape of one sample, at most 2^34 elements.
        seed: 64-bit integer or 0-d integer tensor on the same device.
        stream: which independent draw for the same seed and id; its low 32 bits count. Integer or
        0-d tensor.

    Raises:
        TypeError: wrong type or dtype. InputError: wrong shape, device or range.

    Source: Salmon et al., SC 2011 (Philox4x32-10); Box and Muller, 1958.
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
        return _operation(sample_ids, size, *split(seed), *split(stream))
    return _run(sample_ids, size, seed, stream)
