"""The form of a batch: the scale of its values, its dtype and its memory layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpfast.errors import InputError
from dpfast.ops import check

TINY = torch.finfo(torch.float32).tiny  # less than that has no inverse in float32


@dataclass(frozen=True, kw_only=True)
class BatchFormat:
    """The memory layout of a batch and the scale of its values.

    A pixel v in [0, 255] becomes (v / 255 - mean) / std.

    Args:
        mean: One finite number, or one for each channel.
        std: One number above 0, or one for each channel.
        dtype: float32, float16 or bfloat16.
        channels_last: True for channels_last memory, False for contiguous memory.

    Raises:
        TypeError: For another dtype, and for what is no number.
        InputError: For a mean that is not finite, and a std that is not above 0.

    Examples:
        >>> import dpfast
        >>> dpfast.BatchFormat(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).per_channel(3)
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """

    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    dtype: torch.dtype = torch.float32
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in check.FLOATS:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {self.dtype}")
        if not isinstance(self.channels_last, bool):
            raise TypeError(f"channels_last must be True or False, got {self.channels_last!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if isinstance(value, (np.ndarray, torch.Tensor)):
                value = value.tolist()
            numbers = value if isinstance(value, (list, tuple)) else (value,)
            for number in numbers:
                check.number(name, number)
                if name == "std" and number < TINY:
                    raise InputError(
                        f"std = {value}: expected numbers above 0, {TINY:.3g} at least"
                    )
            if not numbers:
                raise InputError(f"{name} = {value}: expected a number, or one for each channel")
            plain = tuple(float(number) for number in numbers)
            object.__setattr__(self, name, plain if numbers is value else plain[0])

    def per_channel(self, channels: int) -> tuple[Sequence[float], Sequence[float]]:
        """Returns mean and std as one number for each channel; sequences as they are."""
        mean = (self.mean,) * channels if isinstance(self.mean, float) else self.mean
        std = (self.std,) * channels if isinstance(self.std, float) else self.std
        return mean, std
