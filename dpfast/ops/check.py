"""Checks of arguments, shared by the operations: each error names the argument, its shape and what
is expected.
"""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

from dpfast.errors import LARGEST, InputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def number(name: str, value: object) -> None:
    """Raises ``TypeError`` unless ``value`` is a real number, ``InputError`` unless float32 holds
    it as a finite one.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not abs(value) <= LARGEST:  # type: ignore[operator]
        raise InputError(f"{name} = {value}: expected a finite number of float32")


def whole(name: str, value: object, meaning: str, *, low: int = 1) -> None:
    """Raises ``TypeError`` unless ``value`` is an integer, ``InputError`` for one below ``low``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise InputError(f"{name} = {value}: expected {meaning}")


def tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> Tensor:
    """Returns `value` as a tensor of one of `dtypes`, on `device` where one is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} must be {expected}, got {value.dtype} of shape {tuple(value.shape)}"
        )
    if device is not None and value.device != device:
        raise InputError(
            f"{name} of shape {tuple(value.shape)} is on {value.device}, expected {device}"
        )
    return value


def shaped(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns `value`, whose shape must be exactly `shape`."""
    if value.shape != torch.Size(shape):
        raise InputError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    return value


def target(
    name: str,
    value: object,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    channels_last: bool = False,
) -> Tensor:
    """Returns a tensor to write into, in contiguous or channels_last memory."""
    out = shaped(name, tensor(name, value, (dtype,), device), shape)
    if not out.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    ):
        layout = "channels_last" if channels_last else "contiguous"
        raise InputError(
            f"{name} of shape {tuple(out.shape)} has strides "
            f"{out.stride()}, expected {layout} memory"
        )
    return out


def per_sample(
    name: str, value: float | Tensor, batch: int, device: torch.device
) -> float | Tensor:
    """Returns a scalar, or a floating tensor of shape () or (batch,) on `device`; tensors come back
    as fp32.
    """
    if isinstance(value, Tensor):
        tensor(name, value, (*FLOATS, torch.float64), device)
        if value.shape not in (torch.Size(()), torch.Size((batch,))):
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected () or ({batch},)")
        return value.float()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name} must be a number or a tensor of shape () or ({batch},), got "
            f"{type(value).__name__}"
        )
    return float(value)


def integer(name: str, value: int | Tensor, device: torch.device) -> int | Tensor:
    """Returns a Python integer, or an int64 or int32 tensor of shape () or (1,) on `device`, which
    comes back 0-d.
    """
    if isinstance(value, Tensor):
        tensor(name, value, (torch.int64, torch.int32), device)
        if value.numel() != 1:
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected ()")
        return value.reshape(())
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an integer or a 0-d integer tensor, got {type(value).__name__}"
        )
    return value
