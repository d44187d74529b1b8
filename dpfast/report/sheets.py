"""Contact sheets: many small images as one picture, pixel for pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

GAP = 1  # pixels between images
# pixels: small images are enlarged by a whole number, so that their pixels stay square and sharp
TARGET = 48
LARGEST = 192  # pixels: the side of an image in a sheet, at most
WIDEST = 6000  # pixels of all images of a row
MOST = 36_000_000  # pixels of all images of a sheet
NAME = 32  # letters of a name above a column, at most
DPI = 100
LETTER = 7.5  # pixels of a letter of a name, about


def tile(rows: list[Tensor], *, background: int = 255) -> Image.Image:
    """Returns a grid of images; ``rows`` holds one uint8 (n, C, H, W) tensor per row, of any n, C
    being 1 or 3.
    """
    columns = max(len(row) for row in rows)
    channels, height, width = rows[0].shape[1:]
    size = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    grid = torch.full(size, background, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + GAP), c * (width + GAP)
            grid[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return Image.fromarray(grid.squeeze(-1).numpy())


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """Returns a grid of images with ``side`` pixels each, at least ``TARGET`` pixels an image."""
    factor = max(1, -(-TARGET // side))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def reduced(images: Tensor, side: int = LARGEST) -> Tensor:
    """Returns uint8 images (n, C, H, W) whose longer side is at most ``side`` pixels, each pixel
    the mean of those that it stands for.
    """
    height, width = images.shape[-2:]
    if max(height, width) <= side:
        return images
    size = [max(1, round(each * side / max(height, width))) for each in (height, width)]
    return F.interpolate(images.float(), size, mode="area").round().to(torch.uint8)


def side_of(rows: int, columns: int) -> int:
    """Returns pixels of the longer side of an image in a sheet of so many rows and columns, at
    most.
    """
    return max(1, min(LARGEST, WIDEST // columns, math.isqrt(MOST // (rows * columns))))


def contact_sheet(
    rows: list[Tensor],
    names: Sequence[str],
    title: str,
    path: Path,
    *,
    columns: Sequence[tuple[str, int]] = (),
) -> Path:
    """Writes a PNG of a grid with a title, and returns its path.

    Images are shown pixel for pixel, small ones enlarged as by ``enlarged``, large ones and those
    of many ``reduced`` to ``side_of``.

    Args:
        rows: as for ``tile``.
        names: of the rows.
        title: above all.
        path: of the PNG.
        columns: names above the columns, long ones cut, each with how many columns it is of.
    """
    longest = max(len(row) for row in rows)
    rows = [reduced(row, side_of(len(rows), longest)) for row in rows]
    height, width = rows[0].shape[-2:]
    grid = tile(rows)
    picture = enlarged(grid, width)
    factor = picture.width / grid.width
    figure = Figure(figsize=(picture.width / DPI, picture.height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(
        picture,
        cmap="gray" if picture.mode == "L" else None,
        vmin=0,
        vmax=255,
        interpolation="none",
    )
    down = [factor * (r * (height + GAP) + height / 2) for r in range(len(rows))]
    axes.set_yticks(down, names, fontsize=9)
    columns = [(n if len(n) <= NAME else f"{n[: NAME - 3]}...", count) for n, count in columns]
    across, above, start = [], [], 0
    for name, count in columns:
        across.append(factor * ((start + count / 2) * (width + GAP) - GAP / 2))
        above.append(name)
        start += count
    axes.xaxis.tick_top()
    room = [factor * count * (width + GAP) for _, count in columns]
    upright = any(LETTER * len(n) > r for (n, _), r in zip(columns, room, strict=True))
    axes.set_xticks(across, above, fontsize=9, rotation=90 if upright else 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.1)
    return path
