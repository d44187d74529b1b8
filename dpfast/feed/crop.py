"""A box of every image as a batch of one size: crop, resize, shift and mirror in one linear map for each axis.

    out[b, c] = R_b image[b, c] C_b^T,   R_b (height, H) and C_b (width, W)

Output j of n over a box [start, start + length) is centred at x = start + (j + 1/2) length/n - 1/2. It weighs input k
with the triangle max(0, 1 - |k - x| / r), r = max(length/n, 1), normalised: bilinear where the box is enlarged, free of
aliases where it is shrunk, as Pillow, torch (``antialias=True``) and DALI (``INTERP_TRIANGULAR``) do. Inputs beyond
the image repeat its border, so a box of the image's size at a whole offset is a shift; a mirrored sample has the rows
of C_b in reverse. The kernel resamples a line of a box once and reads uint8: B C (h w + 4 H' W') bytes, boxes h x w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpfast.ops import _check, _dispatch
from dpfast.ops.gather import constants
from dpfast.pool.rows import ChunkTable, check_indices


def axis_weights(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """R_b of boxes [start, start + length), both (B,), over an axis: (B, outputs, inputs) float32."""
    step = length.double() / outputs
    reach = step.clamp(min=1.0)
    taps = int((2.0 * reach).ceil().max()) if len(step) else 0
    centre = start.double()[:, None] + (torch.arange(outputs, device=start.device) + 0.5) * step[:, None] - 0.5
    low = (centre - reach[:, None]).floor() + 1
    places = low[..., None] + torch.arange(taps, device=start.device)
    weights = (1.0 - (places - centre[..., None]).abs() / reach[:, None, None]).clamp(min=0.0)
    weights = (weights / weights.sum(-1, keepdim=True)).float()
    matrix = torch.zeros(len(start), outputs, inputs, device=start.device)
    return matrix.scatter_add_(2, places.clamp(0, inputs - 1).long(), weights)


def resample(images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch: (B, C, H, W) floating point to (B, C, *size), on any device.

    boxes: (B, 4) float32 of (top, left, height, width) in pixels; flip: (B,) bool.
    """
    rows = axis_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size[0]).to(images.dtype)
    columns = axis_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size[1]).to(images.dtype)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns.mT[:, None]


def crop_rows(
    table: ChunkTable,
    total: int,
    shape: Sequence[int],
    indices: Tensor,
    boxes: Tensor,
    *,
    size: tuple[int, int],
    flip: Tensor | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Boxes of uint8 images in a table of chunks on the host, normalised as by ``gather_batch``: (B, C, *size).

    The native kernel where it is built, else ``resample``. A box of a whole image is ``gather_batch`` bit by bit.

    Args:
        total: samples in the table. shape: (C, H, W) of each.
        indices: (B,) int64. boxes: (B, 4) float32 of (top, left, height, width) in pixels. flip: (B,) bool.
        out: where to write the batch, in its shape, dtype and layout. threads: of the kernel, torch's by default.

    Raises ``TypeError`` or ``ValueError`` for a wrong dtype or shape, ``IndexError`` for an index outside the table.
    """
    _check.tensor("indices", indices, (torch.int64,))
    _check.shaped("boxes", _check.tensor("boxes", boxes, (torch.float32,), indices.device), (len(indices), 4))
    if flip is not None:
        _check.shaped("flip", _check.tensor("flip", flip, (torch.bool,), indices.device), (len(indices),))
    if not bool((boxes[:, 2:] > 0).all() & boxes.isfinite().all()):
        raise ValueError("boxes must be finite with heights and widths above 0")
    target = (len(indices), shape[0], *size)
    if out is None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(target, dtype=dtype, memory_format=layout)
    else:
        _check.target("out", out, dtype, target, indices.device, channels_last)
    scale, bias = constants(mean, std, shape[0], indices.device)
    if _dispatch.backend_for(indices.device) != "native":
        rows = table.take(indices, total).view(len(indices), *shape).float()
        return out.copy_(resample(rows * scale[:, None, None] + bias[:, None, None], boxes, size, flip))
    indices, boxes = indices.contiguous(), boxes.contiguous()
    flip = None if flip is None else flip.contiguous()
    inside = _dispatch.native_module().crop_chunks(
        table.addresses.data_ptr(),
        table.chunk_rows,
        total,
        table.stride,
        *shape,
        indices.data_ptr(),
        len(indices),
        boxes.data_ptr(),
        *size,
        _dispatch.address(flip),
        scale.data_ptr(),
        bias.data_ptr(),
        _dispatch.DTYPE_CODES[dtype],
        channels_last,
        out.data_ptr(),
        threads or torch.get_num_threads(),
    )
    if not inside:
        check_indices(indices, total)
    return out
