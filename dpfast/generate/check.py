"""Checks of what a sampler is given: each error names the argument, what it is and what is
expected.
"""

from __future__ import annotations

from numbers import Integral, Real
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops.check import number


def integer(name: str, value: object) -> int:
    """Returns ``value``. Raises ``TypeError`` unless it is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return value  # type: ignore[return-value]


def count(name: str, value: object, meaning: str) -> None:
    """Raises ``TypeError`` unless ``value`` is an integer, ``InputError`` for one below 1."""
    if integer(name, value) < 1:
        raise InputError(f"{name} = {value}: expected {meaning}")


def pixels(name: str, value: object) -> int:
    """Returns ``value``. Raises ``TypeError`` unless it is an integer, ``InputError`` below 0."""
    if integer(name, value) < 0:
        raise InputError(f"{name} = {value}: expected pixels, or 0 for the model's own")
    return int(value)  # type: ignore[call-overload]


def at_least_zero(name: str, value: object) -> None:
    """Checks as ``number`` does, and raises ``InputError`` for a negative one as well."""
    number(name, value)
    if value < 0:  # type: ignore[operator]
        raise InputError(f"{name} = {value}: expected at least 0")


def instance(name: str, value: object, kind: type | UnionType, meaning: str) -> None:
    """Raises ``TypeError`` unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {meaning}, got {value!r}")


def pair(name: str, value: object, kind: type, meaning: str) -> None:
    """Raises ``TypeError`` unless ``value`` is two numbers of ``kind``, such as ``Real``."""
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(isinstance(part, kind) for part in value)
    ):
        raise TypeError(f"{name} must be {meaning}, got {value!r}")


def interval(name: str, start: float, stop: float) -> None:
    """Raises ``InputError`` unless 0 <= start < stop <= 1."""
    if not 0 <= start < stop <= 1:
        raise InputError(
            f"{name} = ({start:g}, {stop:g}): expected "
            "fractions of the steps, 0 <= start < stop <= 1"
        )


def schedule(name: str, points: object) -> None:
    """Raises ``TypeError`` unless ``points`` are pairs of numbers, a fraction of the steps and a
    factor, and ``InputError`` unless the fractions rise within 0 and 1 and no factor is negative.
    """
    wanted = "(fraction of the steps, factor)"
    if not isinstance(points, (tuple, list)):
        raise TypeError(f"{name} must be pairs {wanted}, got {points!r}")
    before = -1.0
    for point in points:
        pair(f"each of {name}", point, Real, wanted)
        fraction, factor = point
        number(name, fraction)
        at_least_zero(name, factor)
        if not (before < fraction and 0 <= fraction <= 1):
            raise InputError(
                f"{name} = {points!r}: expected fractions of the steps that rise, from 0 to 1 at "
                "most"
            )
        before = fraction


def integers(name: str, values: Any) -> Tensor:
    """Returns ``values`` as an int64 tensor. Raises ``TypeError`` for anything that is not
    integers, fractions included, ``InputError`` for a tensor without values.
    """
    given = _tensor(name, values, "integers")
    if given.numel() and (
        given.is_floating_point() or given.is_complex() or given.dtype == torch.bool
    ):
        raise TypeError(f"{name} must be integers, got {given.dtype}")
    return given.to(torch.int64)


def numbers(name: str, values: Any) -> Tensor:
    """Returns ``values`` as a float32 tensor. Raises ``TypeError`` for what is no number or
    numbers, truth values included, ``InputError`` for a tensor without values.
    """
    given = _tensor(name, values, "a number or a tensor of numbers")
    if given.dtype == torch.bool or given.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of numbers, got {given.dtype}")
    return given.to(torch.float32)


def _tensor(name: str, values: Any, expected: str) -> Tensor:
    try:
        given = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be {expected}, got {values!r}") from error
    if given.is_meta:
        raise InputError(f"{name} is a tensor on the device meta, without values")
    return given
