"""Boxes of images as a normalised batch on a GPU, in one pass: the map of ``dpfast.pool.batch``.

A thread makes output pixels: it weighs the few inputs that their triangles cover and reads them
where the chunks lie, in device memory or in pinned memory of the host. Neighbours share inputs,
which the caches serve. Bytes: about B C (h w + b_out H' W') of boxes of h x w pixels.

Places are found in fp32: at 224 pixels a weight is off by up to 1e-5 of fp64's, and by nothing for
whole boxes.

Nothing waits for the device: how many inputs a triangle covers is a constant of a launch, found in
the boxes while they are on the host.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfast.ops.triton_stub import tl, triton

BLOCK, WARPS = 256, 4  # output pixels and warps of a program


@triton.jit
def _axis(start, length, output, OUTPUTS: tl.constexpr):
    """Centre and reach of the triangle of an output, and the first input that it covers."""
    step = length / OUTPUTS
    reach = tl.maximum(step, 1.0)
    centre = start + (output.to(tl.float32) + 0.5) * step - 0.5
    return centre, reach, tl.floor(centre - reach) + 1.0


@triton.jit
def _tap(first, tap, centre, reach, INPUTS: tl.constexpr):
    """The weight of one covered input, and its place; inputs beyond the image repeat its border."""
    place = first + tap
    weight = tl.maximum(1.0 - tl.abs(place - centre) / reach, 0.0)
    return weight, tl.minimum(tl.maximum(place, 0.0), INPUTS - 1.0).to(tl.int32)


@triton.jit
def crops_kernel(
    addresses,
    indices,
    boxes,
    flip,
    scale,
    bias,
    out,
    chunk_rows,
    stride,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of one image a program, all channels. ELEMENT is the type of the images, stride
    in bytes.
    """
    image = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < LINES * COLUMNS
    index = tl.load(indices + image)
    address = tl.load(addresses + index // chunk_rows) + index % chunk_rows * stride
    source = address.to(tl.pointer_type(ELEMENT))
    column = pixel % COLUMNS
    if flip is not None:
        column = tl.where(tl.load(flip + image) != 0, COLUMNS - 1 - column, column)
    top, left = tl.load(boxes + image * 4), tl.load(boxes + image * 4 + 1)
    height, width = tl.load(boxes + image * 4 + 2), tl.load(boxes + image * 4 + 3)
    centre_y, reach_y, first_y = _axis(top, height, pixel // COLUMNS, LINES)
    centre_x, reach_x, first_x = _axis(left, width, column, COLUMNS)
    target = out + image * (CHANNELS * LINES * COLUMNS)
    for channel in tl.static_range(CHANNELS):
        value = tl.zeros((BLOCK,), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(ROW_TAPS):
            weight_y, y = _tap(first_y, i, centre_y, reach_y, HEIGHT)
            for j in range(COLUMN_TAPS):
                weight_x, x = _tap(first_x, j, centre_x, reach_x, WIDTH)
                weight = weight_y * weight_x
                at = source + (channel * HEIGHT + y) * WIDTH + x
                value += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
                total += weight
        value = value / total * tl.load(scale + channel) + tl.load(bias + channel)
        place = pixel * CHANNELS + channel if CHANNELS_LAST else channel * (LINES * COLUMNS) + pixel
        tl.store(target + place, value.to(out.dtype.element_ty), mask=inside)


def taps(lengths: Tensor, outputs: int) -> int:
    """The most inputs that one of ``outputs`` triangles covers over an axis of boxes of ``lengths``
    (B,), on the CPU.

    Rounded up to a power of two: each number is a kernel of its own.
    """
    reach = max(float(lengths.max()) / outputs, 1.0) if len(lengths) else 1.0
    return 1 << (math.ceil(2 * reach) - 1).bit_length()


def launch(
    addresses: Tensor,
    chunk_rows: int,
    shape: tuple[int, int, int],
    stride: int,
    indices: Tensor,
    boxes: Tensor,
    flip: Tensor | None,
    affine: tuple[Tensor, Tensor],
    element: torch.dtype,
    out: Tensor,
) -> None:
    """Writes ``out`` (B, C, H', W'), contiguous or channels last, out of images of ``shape`` (C, H,
    W).

    addresses: (n,) int64 of chunks of chunk_rows images, stride bytes apart, uint8 or float32
    (``element``);
    indices: (B,) int64; flip: (B,) bool; affine: (C,) float32 scale and bias. These and out lie on
    the device, boxes (B, 4) float32 on the CPU.
    """
    if not out.numel():
        return
    count, _, lines, columns = out.shape
    device = out.device
    crops_kernel[(count, -(-lines * columns // BLOCK))](
        addresses,
        indices.contiguous(),
        boxes.contiguous().to(device, non_blocking=True),
        None if flip is None else flip.contiguous().view(torch.uint8),
        *affine,
        out,
        chunk_rows,
        stride,
        *shape,
        lines,
        columns,
        taps(boxes[:, 2], lines),
        taps(boxes[:, 3], columns),
        not out.is_contiguous(),
        tl.uint8 if element == torch.uint8 else tl.float32,
        BLOCK,
        num_warps=WARPS,
    )
