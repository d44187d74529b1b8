"""RandAugment (Cubuk et al. 2020) on a batch of tensors: each image is changed by operations of its
own.

The operations, their order and their strengths are those of ``torchvision.transforms.RandAugment``
with 31 magnitudes; what they do to an image in bytes is what Pillow does, which the tests compare
with. Neither torchvision nor kornia is asked: both choose one operation for a whole batch of
tensors and draw from torch's own generator, so that an image would depend on its batch, on the
number of ranks, and on what else has drawn; and torchvision does not import beside every torch.
Their transforms run as an augmentation of the user's own (``dpfast.feed.own_augment``).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MAGNITUDES = 30.0  # the largest one
GREY = (19595.0, 38470.0, 7471.0)  # of red, green and blue, in 65536ths: Pillow's "L"
Change = Callable[[Tensor, Tensor], Tensor]  # of images by signed strengths (b,), float64


def rand_augment(values: Tensor, operations: Tensor, signs: Tensor, magnitude: float) -> Tensor:
    """Returns images changed by ``operations``, one after the other.

    Args:
        values: (B, C, H, W) floating bytes: whole numbers from 0 to 255, of 1 or 3 channels.
        operations: (B, n) int64 of ``OPERATIONS``, on the CPU.
        signs: (B, n) of 1 and -1, on the CPU, for the operations that have a direction.
        magnitude: 0 to 30.

    Returns (B, C, H, W) of the same kind. Image i is a function of row i alone.
    """
    strength = magnitude / MAGNITUDES
    values = values.clone()
    for chosen, sign in zip(operations.unbind(1), signs.unbind(1), strict=True):
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().flatten()
            here = rows.to(values.device)
            values[here] = OPERATIONS[number](values[here], strength * sign[rows].double())
    return values


def _identity(values: Tensor, strengths: Tensor) -> Tensor:
    return values


def _warped(values: Tensor, matrices: Tensor) -> Tensor:
    """Returns each image sampled at the nearest of the places that (b, 2, 3) matrices give for the
    middles of its pixels; black outside.
    """
    height, width = values.shape[2:]
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5,
        torch.arange(width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    places = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1)
    x, y = (matrices @ places).floor().to(values.device, torch.int64).unbind(1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    index = torch.where(inside, y * width + x, 0)[:, None].expand(-1, values.shape[1], -1)
    found = values.flatten(2).gather(2, index) * inside[:, None]
    return found.view(values.shape)


def _matrices(strengths: Tensor) -> Tensor:
    """Returns (b, 2, 3) float64 that leave every place as it is."""
    return torch.eye(2, 3, dtype=torch.float64).repeat(len(strengths), 1, 1)


def _sheared(axis: int) -> Change:
    def change(values: Tensor, strengths: Tensor) -> Tensor:
        matrices = _matrices(strengths)
        matrices[:, axis, 1 - axis] = 0.3 * strengths
        return _warped(values, matrices)

    return change


def _moved(axis: int) -> Change:
    def change(values: Tensor, strengths: Tensor) -> Tensor:
        matrices = _matrices(strengths)
        matrices[:, axis, 2] = (150 / 331 * values.shape[3 - axis] * strengths).trunc()
        return _warped(values, matrices)

    return change


def _turned(values: Tensor, strengths: Tensor) -> Tensor:
    """Returns the images turned about the middle by up to 30 degrees."""
    angles = strengths * math.radians(30)
    cos, sin = angles.cos(), angles.sin()
    y, x = (size / 2 for size in values.shape[2:])
    first = torch.stack([cos, sin, x - cos * x - sin * y], 1)
    second = torch.stack([-sin, cos, y + sin * x - cos * y], 1)
    return _warped(values, torch.stack([first, second], 1))


def _blended(values: Tensor, other: Tensor, strengths: Tensor) -> Tensor:
    """Blends from ``other`` at the factor 0 through the image at 1 and beyond it, as
    ``Image.blend``.
    """
    factors = (1 + 0.9 * strengths).to(values.device, values.dtype).view(-1, 1, 1, 1)
    return (other + factors * (values - other)).clamp(0, 255).floor()


def _grey(values: Tensor) -> Tensor:
    if values.shape[1] != 3:
        return values
    weights = values.new_tensor(GREY).view(1, 3, 1, 1)
    return (((values * weights).sum(1, keepdim=True) + 32768) / 65536).floor()


def _brightness(values: Tensor, strengths: Tensor) -> Tensor:
    return _blended(values, torch.zeros_like(values), strengths)


def _colour(values: Tensor, strengths: Tensor) -> Tensor:
    return _blended(values, _grey(values).expand_as(values), strengths)


def _contrast(values: Tensor, strengths: Tensor) -> Tensor:
    means = (_grey(values).mean((1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor()
    return _blended(values, means.to(values.dtype).expand_as(values), strengths)


def _sharpness(values: Tensor, strengths: Tensor) -> Tensor:
    """Sharpens or smooths. The other end is the mean of a pixel, at five times the weight, and its
    neighbours; the border stays.
    """
    height, width = values.shape[2:]
    if min(height, width) < 3:
        return values
    smooth = values.clone()
    inner = 4 * values[:, :, 1:-1, 1:-1]
    for top in range(3):
        for left in range(3):
            inner = inner + values[:, :, top : top + height - 2, left : left + width - 2]
    smooth[:, :, 1:-1, 1:-1] = (inner / 13 + 0.5).floor()
    return _blended(values, smooth, strengths)


def _posterized(values: Tensor, strengths: Tensor) -> Tensor:
    """Returns the images without the lowest bits, up to four of the eight."""
    steps = (2.0 ** (4 * strengths.abs()).round()).to(values.device, values.dtype)
    steps = steps.view(-1, 1, 1, 1)
    return (values / steps).floor() * steps


def _solarized(values: Tensor, strengths: Tensor) -> Tensor:
    """Returns the images inverted from a threshold on."""
    thresholds = (255 * (1 - strengths.abs())).to(values.device, values.dtype).view(-1, 1, 1, 1)
    return torch.where(values < thresholds, values, 255 - values)


def _autocontrast(values: Tensor, strengths: Tensor) -> Tensor:
    """Returns each channel from its darkest value, which becomes 0, to its brightest, which becomes
    255.
    """
    exact = values.double()
    low, high = exact.amin((2, 3), keepdim=True), exact.amax((2, 3), keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    spread = (exact * scale - low * scale).clamp(0, 255).floor()
    return torch.where(high > low, spread, exact).to(values.dtype)


def _equalized(values: Tensor, strengths: Tensor) -> Tensor:
    """Returns each channel with a histogram as even as a map of its values can make it."""
    levels = values.flatten(2).to(torch.int64)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=values.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    brightest = levels.amax(2, keepdim=True)
    step = (levels.shape[2] - counts.gather(2, brightest)) // 255
    whole = step.clamp(min=1)
    table = ((counts.cumsum(2) - counts + whole // 2) // whole).clamp(max=255)
    even = torch.where(step > 0, table.gather(2, levels), levels)
    return even.view(values.shape).to(values.dtype)


OPERATIONS: tuple[Change, ...] = (
    _identity,
    _sheared(0),
    _sheared(1),
    _moved(0),
    _moved(1),
    _turned,
    _brightness,
    _colour,
    _contrast,
    _sharpness,
    _posterized,
    _solarized,
    _autocontrast,
    _equalized,
)
