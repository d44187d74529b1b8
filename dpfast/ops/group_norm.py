"""GroupNorm of images in NHWC, with what a residual block puts before and behind it, in the passes
that the memory needs.

    u = x + s                      s: a shift of each (sample, channel): a folded bias, a time row
    z = w (u - mean) / sqrt(var + eps) + b       mean, var: of a group of channels of one sample
    y = z, or z sigmoid(z)                                                       (SiLU)

Two tensors in the place of x are normalised as their concatenation, which never exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check


def reference(
    x: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """The formula in plain PyTorch, rounded where its operations round."""
    x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
    if shift is not None:
        x = x + shift.to(x.dtype).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def _check_arguments(
    sources: tuple[Tensor, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
) -> None:
    dtypes = (*check.FLOATS, torch.float64)
    names = ("x",) if len(sources) == 1 else ("x[0]", "x[1]")
    if len(sources) not in (1, 2):
        raise InputError(f"x has {len(sources)} tensors, expected one or two")
    first = check.tensor(names[0], sources[0], dtypes)
    if first.dim() < 3:
        raise InputError(f"{names[0]} has shape {tuple(first.shape)}, expected (B, C, H, W)")
    for name, source in zip(names[1:], sources[1:], strict=True):
        check.tensor(name, source, (first.dtype,), first.device)
        channels = source.shape[1] if source.dim() > 1 else 0
        check.shaped(name, source, (first.shape[0], channels, *first.shape[2:]))
    channels = sum(source.shape[1] for source in sources)
    check.whole("groups", groups, "at least one group")
    if channels == 0 or channels % groups:
        raise InputError(f"groups = {groups}: expected a divisor of the {channels} channels of x")
    check.number("eps", eps)
    if eps < 0:
        raise InputError(f"eps = {eps}: expected a number that is not negative")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check.shaped(name, check.tensor(name, value, dtypes, first.device), (channels,))
    if shift is not None:
        check.tensor("shift", shift, dtypes, first.device)
        if shift.shape not in (torch.Size((channels,)), torch.Size((len(first), channels))):
            raise InputError(
                f"shift has shape {tuple(shift.shape)}, expected ({channels},) or "
                f"({len(first)}, {channels})"
            )


def group_norm(
    x: Tensor | tuple[Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """GroupNorm of x, or of two tensors as if they were concatenated, with a SiLU behind it.

    Args:
        x: (B, C, H, W), or any (B, C, ...), fp32, fp16 or bf16, best in channels_last memory: the
            kernels work on a channels_last copy of any other layout. Or two such tensors, of C1 and
            C2 channels and otherwise alike; C = C1 + C2.
        weight: (C,) factors of the channels, or None for 1.
        bias: (C,) or None for 0.
        groups: into how many groups of neighbouring channels C is parted.
        eps: what is added to the variance.
        shift: (C,) or (B, C), added to x first; or None. In the kernels it costs nothing.
        silu: whether y = z sigmoid(z) of the normalised z is returned.

    Returns:
        (B, C, H, W) in x's dtype, in channels_last memory where kernels made it. Differentiable
        once, in x only: weight, bias and shift count as constants (frozen), even where they ask for
        a gradient. A sample's bits depend on no other sample.

    Raises:
        TypeError: wrong type or dtype. InputError: wrong shape or device, a number of groups that
        does not divide the channels, a negative eps.

    Source: Wu and He, "Group Normalization" (2018).
    """
    sources = x if isinstance(x, tuple) else (x,)
    _check_arguments(sources, weight, bias, groups, eps, shift)
    constants = (None if t is None else t.detach() for t in (weight, bias, shift))
    weight, bias, shift = constants
    return reference(x, weight, bias, groups, eps, shift, silu)
