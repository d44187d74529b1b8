"""A batch out of a store of uint8 images: chosen rows, optionally mirrored, normalised, in one pass.

    batch[i, c, h, w] = (store[indices[i], c, h, w'] / 255 - mean[c]) / std[c],   w' = W - 1 - w where flip[i], else w

Bytes: B C H W (1 + b_out) + 8 B.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.ops import _check


def reference(
    store: Tensor,
    indices: Tensor,
    flip: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The formula in plain PyTorch, fp32 inside: byte * scale[c] + bias[c]."""
    rows = store.index_select(0, indices).float()
    if flip is not None:
        rows = torch.where(flip[:, None, None, None], rows.flip(3), rows)
    batch = rows * scale[:, None, None] + bias[:, None, None]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return batch.to(dtype).contiguous(memory_format=layout)


def _affine(name: str, value: Sequence[float] | Tensor, channels: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return _check.shaped(name, _check.tensor(name, value, (*_check.FLOATS, torch.float64), device), (channels,))
    numbers = tuple(float(number) for number in value)
    if len(numbers) != channels:
        raise ValueError(f"{name} has {len(numbers)} values, expected one for each of {channels} channels")
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    return _constant(numbers, device)


@functools.lru_cache(maxsize=64)
def _constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def gather_batch(
    store: Tensor,
    indices: Tensor,
    *,
    flip: Tensor | None = None,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Rows of a uint8 image store as a normalised batch.

    Args:
        store: (N, C, H, W) uint8; each row contiguous.
        indices: (B,) int64 in [0, N).
        flip: (B,) bool, which rows to mirror left to right; None mirrors none.
        mean, std: one number for each channel, for pixels in [0, 1]; a sequence or a (C,) tensor on the same device.
        dtype: fp32, fp16 or bf16 of the batch.
        channels_last: memory layout of the batch.

    Returns:
        (B, C, H, W) of `dtype`, in channels_last or contiguous memory.

    Raises:
        TypeError: wrong type or dtype. ValueError: wrong shape or device. IndexError: an index outside the store, on a
        CPU; on a GPU, where the host cannot look, such a row is NaN.
    """
    _check.tensor("store", store, (torch.uint8,))
    if store.dim() != 4:
        raise ValueError(f"store has shape {tuple(store.shape)}, expected (N, C, H, W)")
    _check.tensor("indices", indices, (torch.int64,), store.device)
    if indices.dim() != 1:
        raise ValueError(f"indices has shape {tuple(indices.shape)}, expected (B,)")
    if flip is not None:
        _check.shaped("flip", _check.tensor("flip", flip, (torch.bool,), store.device), tuple(indices.shape))
    if dtype not in _check.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    channels = store.shape[1]
    deviation = _affine("std", std, channels, store.device).double()
    # In fp64, so that the two constants of a channel carry one rounding each.
    scale = (1.0 / (255.0 * deviation)).float()
    bias = (-_affine("mean", mean, channels, store.device).double() / deviation).float()
    return reference(store, indices, flip, scale, bias, dtype, channels_last)
