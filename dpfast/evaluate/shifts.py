"""Shifts of real images: what a camera, a file format or another framing does to a test set, in
five severities.

Written after the idea of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) for images of
any size: lengths are fractions of the shorter side. A shifted image depends on its pixels, its id,
the seed and the severity, not on its batch: noise and directions come from ``dpfast.ops.normal``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dpfast.data.pictures import from_image_file
from dpfast.errors import InputError
from dpfast.ops import normal

SEVERITIES = (1, 2, 3, 4, 5)
STREAM = 0x5111F7  # of the noise generator; samplers and augmentations use small numbers

NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)  # standard deviation, of the range of pixels
BLUR = (0.01, 0.015, 0.02, 0.03, 0.04)  # standard deviation of the Gaussian, of the shorter side
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # what is left of the distance from each image's mean
PIXELATE = (0.75, 0.6, 0.5, 0.4, 0.3)  # resolution left, of each side
JPEG = (25, 18, 15, 10, 7)  # quality
ROTATE = (5.0, 10.0, 15.0, 20.0, 30.0)  # degrees, left or right by the image's id
TRANSLATE = (0.04, 0.08, 0.12, 0.16, 0.2)  # of the shorter side, in a direction of the image's id


def shift(
    images: Tensor, name: str, severity: int, *, ids: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Returns shifted copies of uint8 images (N, C, H, W), in the same shape and type.

    Args:
        name: one of ``SHIFTS``.
        severity: 1 (mild) to 5 (strong).
        ids: (N,) int64, the images' identities; None: their positions.
        seed: of the noise and the directions.

    Raises ``TypeError`` for images that are not uint8, ``InputError`` for another shape, an unknown
    shift or severity.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: dtype is {images.dtype}, expected torch.uint8")
    if images.dim() != 4:
        raise InputError(f"images: shape is {tuple(images.shape)}, expected (N, C, H, W)")
    if name not in SHIFTS:
        raise InputError(f"name = {name!r}: no such shift; known are {', '.join(SHIFTS)}")
    if severity not in SEVERITIES:
        raise InputError(f"severity = {severity!r}: expected 1 to 5")
    ids = torch.arange(len(images), device=images.device) if ids is None else ids
    if ids.shape != (len(images),):
        raise InputError(f"ids: shape is {tuple(ids.shape)}, expected ({len(images)},)")
    if not len(images):
        return images.clone()
    return SHIFTS[name](images, severity - 1, ids, seed)


def _noise(images: Tensor, level: int, ids: Tensor, seed: int) -> Tensor:
    return _bytes(
        images + 255 * NOISE[level] * normal(ids, images.shape[1:], seed=seed, stream=STREAM)
    )


def _blur(images: Tensor, level: int, ids: Tensor, seed: int) -> Tensor:
    sigma = BLUR[level] * min(images.shape[-2:])
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=images.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    planes = images.flatten(0, 1).unsqueeze(1).float()
    padded = F.pad(planes, (reach, reach, reach, reach), mode="replicate")
    blurred = F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return _bytes(blurred).view_as(images)


def _contrast(images: Tensor, level: int, ids: Tensor, seed: int) -> Tensor:
    pixels = images.float()
    mean = pixels.mean((2, 3), keepdim=True)
    return _bytes(mean + CONTRAST[level] * (pixels - mean))


def _pixelate(images: Tensor, level: int, ids: Tensor, seed: int) -> Tensor:
    size = images.shape[-2:]
    small = [max(1, round(PIXELATE[level] * side)) for side in size]
    return _bytes(
        F.interpolate(F.interpolate(images.float(), small, mode="area"), size, mode="nearest-exact")
    )


def _jpeg(images: Tensor, level: int, ids: Tensor, seed: int) -> Tensor:
    """Compresses three channels as one RGB picture, any other number as grey ones."""
    colour = images.shape[1] == 3
    pictures = images.permute(0, 2, 3, 1) if colour else images.flatten(0, 1)
    decoded = []
    for picture in pictures.cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=JPEG[level])
        decoded.append(from_image_file(file.getvalue()))
    return torch.from_numpy(np.stack(decoded)).view(images.shape).to(images.device)


def _rotate(images: Tensor, level: int, ids: Tensor, seed: int) -> Tensor:
    side = normal(ids, (1,), seed=seed, stream=STREAM + 1).sign().squeeze(1)
    angle = side * math.radians(ROTATE[level])
    zero = torch.zeros_like(angle)
    aspect = images.shape[-2] / images.shape[-1]  # the grid counts in half heights and half widths
    cos, sin = angle.cos(), angle.sin()
    return _resample(
        images, torch.stack([cos, -sin * aspect, zero, sin / aspect, cos, zero], 1).view(-1, 2, 3)
    )


def _translate(images: Tensor, level: int, ids: Tensor, seed: int) -> Tensor:
    way = F.normalize(normal(ids, (2,), seed=seed, stream=STREAM + 2), dim=1)
    height, width = images.shape[-2:]
    move = (
        2
        * TRANSLATE[level]
        * min(height, width)
        * way
        / torch.tensor([width, height], device=images.device)
    )
    one = torch.eye(2, device=images.device).expand(len(images), 2, 2)
    return _resample(images, torch.cat([one, move.unsqueeze(2)], 2))


def _resample(images: Tensor, affine: Tensor) -> Tensor:
    """Resamples bilinearly; beyond the border lies the nearest pixel of it."""
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return _bytes(F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False))


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


SHIFTS: dict[str, Callable[[Tensor, int, Tensor, int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
    "rotate": _rotate,
    "translate": _translate,
}
