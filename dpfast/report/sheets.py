"""Contact sheets: many small images as one picture, pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

GAP = 1  # pixels between images
# pixels: small images are enlarged by a whole number, so that their pixels stay square and sharp
TARGET = 48


def tile(rows: list[Tensor], *, background: int = 255) -> Image.Image:
    """A grid of images; ``rows`` holds one uint8 (n, C, H, W) tensor per row, of any n, C being 1
    or 3.
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
    """A grid of images with ``side`` pixels each, at least ``TARGET`` pixels an image."""
    factor = max(1, -(-TARGET // side))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def contact_sheet(rows: list[Tensor], names: tuple[str, ...], title: str, path: Path) -> Path:
    """Writes a PNG of a grid with a title and a name for each row; ``rows`` as for ``tile``."""
    picture = tile(rows)
    height, columns = rows[0].shape[-2], max(len(row) for row in rows)
    figure = Figure(figsize=(2.0 + 0.42 * columns, 0.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, cmap="gray" if picture.mode == "L" else None, vmin=0, vmax=255)
    axes.set_yticks([r * (height + GAP) + height / 2 for r in range(len(rows))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return path
