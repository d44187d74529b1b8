"""From rows of a pool to a batch: whole images or boxes of them, mirrored, resized, normalised, in
one pass.

    out[b, c] = R_b ((image[b, c] / 255 - mean[c]) / std[c]) C_b^T,   R_b (height, H) and C_b
                                                                      (width, W)

R and C are the identity for whole images. Else output j of n over a box [start, start + length) is
centred at x = start + (j + 1/2) length/n - 1/2. It weighs input k with the triangle max(0, 1 - |k -
x| / r), r = max(length/n, 1),
normalised: bilinear where the box is enlarged, free of aliases where it is shrunk, as Pillow, torch
(``antialias=True``) and DALI (``INTERP_TRIANGULAR``) do. Inputs beyond the image repeat its border,
so a box of the image's size at a whole offset is a shift; a mirrored sample has the rows of C_b in
reverse.

Bytes: B C (H W + b_out H W) + 8 B for whole images. A box of h x w pixels is read once, and every
line of it is
resampled once: B C (h w + b_out H' W').
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch, gather_batch
from dpfast.ops.chunk_rows import ChunkTable, check_indices, take_rows
from dpfast.ops.dispatch import CPU
from dpfast.ops.gather import constants
from dpfast.pool import crops


@dataclass(frozen=True, kw_only=True)
class BatchFormat:
    """How a batch lies in memory, and the scale of its values.

    mean, std: a pixel v in [0, 255] becomes (v / 255 - mean) / std, one number or one for each
    channel.
    dtype: float32, float16 or bfloat16; raises ``TypeError`` for another. channels_last: memory
    layout of the batch.
    """

    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5
    dtype: torch.dtype = torch.float32
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in check.FLOATS:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {self.dtype}")

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def per_channel(self, channels: int) -> tuple[Sequence[float], Sequence[float]]:
        """mean and std as one number for each channel; sequences as they are."""
        mean, std = (
            (v,) * channels if isinstance(v, (int, float)) else v for v in (self.mean, self.std)
        )
        return mean, std

    def affine(self, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(C,) float32 scale and bias: byte * scale + bias. Raises ``InputError`` for another
        number of channels.
        """
        return constants(*self.per_channel(channels), channels, device)


def axis_weights(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """R_b of boxes [start, start + length), both (B,), over an axis: (B, outputs, inputs)
    float32.
    """
    step = length.double() / outputs
    reach = step.clamp(min=1.0)
    taps = int((2.0 * reach).ceil().max()) if len(step) else 0
    centre = (
        start.double()[:, None]
        + (torch.arange(outputs, device=start.device) + 0.5) * step[:, None]
        - 0.5
    )
    low = (centre - reach[:, None]).floor() + 1
    places = low[..., None] + torch.arange(taps, device=start.device)
    weights = (1.0 - (places - centre[..., None]).abs() / reach[:, None, None]).clamp(min=0.0)
    weights = (weights / weights.sum(-1, keepdim=True)).float()
    matrix = torch.zeros(len(start), outputs, inputs, device=start.device)
    return matrix.scatter_add_(2, places.clamp(0, inputs - 1).long(), weights)


def resample(
    images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None
) -> Tensor:
    """The formula in plain PyTorch: (B, C, H, W) floating point to (B, C, *size), on any device.

    boxes: (B, 4) float32 of (top, left, height, width) in pixels, on the CPU; flip: (B,) bool.
    """
    rows = axis_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size[0]).to(images)
    columns = axis_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size[1]).to(images)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns.mT[:, None]


def from_images(
    images: Tensor,
    form: BatchFormat,
    *,
    flip: Tensor | None = None,
    boxes: Tensor | None = None,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
) -> Tensor:
    """A batch out of (B, C, H, W) images that are there already, on their device: uint8, or floats
    in [0, 255].

    The arguments and errors of ``from_rows``; flip lies on the images' device, boxes on the CPU.
    """
    if images.dtype == torch.uint8 and dispatch.backend_for(images.device) == "native":
        count, *shape = images.shape
        table = ChunkTable(max(count, 1), math.prod(shape)).with_chunks([images.flatten()])
        rows = torch.arange(count)
        return from_rows(
            table, count, shape, rows, form, flip=flip, boxes=boxes, size=size, threads=threads
        )
    size = _checked_size(images.shape, flip, boxes, size)
    if images.dtype == torch.uint8 and boxes is None:
        rows, (mean, std) = (
            torch.arange(len(images), device=images.device),
            form.per_channel(images.shape[1]),
        )
        return gather_batch(
            images,
            rows,
            flip=flip,
            mean=mean,
            std=std,
            dtype=form.dtype,
            channels_last=form.channels_last,
        )
    if boxes is not None and dispatch.backend_for(images.device) == "triton":
        images = images.contiguous() if images.dtype == torch.uint8 else images.float().contiguous()
        stored = images.view(torch.uint8).view(len(images), -1)
        table = ChunkTable(len(images), stored.shape[1]).with_chunks((stored.flatten(),))
        rows = torch.arange(len(images), device=images.device)
        options = {"flip": flip, "boxes": boxes, "size": size, "element": images.dtype}
        return crop_rows(table, images.shape[1:], rows, form, **options)  # type: ignore[arg-type]
    scale, bias = form.affine(images.shape[1], images.device)
    batch = images.float() * scale[:, None, None] + bias[:, None, None]
    if boxes is not None:
        batch = resample(batch, boxes, size, flip)
    elif flip is not None:
        batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
    return batch.to(form.dtype, memory_format=form.layout)


def crop_rows(
    table: ChunkTable,
    shape: Sequence[int],
    indices: Tensor,
    form: BatchFormat,
    *,
    boxes: Tensor,
    flip: Tensor | None = None,
    size: tuple[int, int] | None = None,
    element: torch.dtype = torch.uint8,
) -> Tensor:
    """A batch of boxes out of a table of chunks that a GPU can read, in one kernel: (B, C, *size)
    on its device.

    The arguments and errors of ``from_rows``; indices and flip lie on that device, boxes on the
    CPU. element: uint8, or float32 for images in [0, 255]. Indices are not looked at.
    """
    size = _checked_size((len(indices), *shape), flip, boxes, size)
    device, (channels, height, width) = indices.device, shape
    out = torch.empty(
        (len(indices), channels, *size), dtype=form.dtype, device=device, memory_format=form.layout
    )
    crops.launch(
        table.addresses.to(device, non_blocking=True),
        table.chunk_rows,
        (channels, height, width),
        table.stride,
        indices,
        boxes,
        flip,
        form.affine(channels, device),
        element,
        out,
    )
    return out


def from_rows(
    table: ChunkTable,
    total: int,
    shape: Sequence[int],
    indices: Tensor,
    form: BatchFormat,
    *,
    flip: Tensor | None = None,
    boxes: Tensor | None = None,
    size: tuple[int, int] | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """A batch out of uint8 images in a table of chunks on the host: (B, C, *size).

    One native kernel reads the images where they lie and holds no lock of Python; without it,
    ``from_images`` of copies. A box of a whole image is the whole image bit by bit.

    Args:
        total: samples in the table. shape: (C, H, W) of each.
        indices: (B,) int64. boxes: (B, 4) float32 of (top, left, height, width) in pixels. flip:
        (B,) bool.
        size: (height, width) of the batch, that of the images by default; another one needs boxes.
        out: where to write the batch, in its shape, dtype and layout. threads: of the kernel,
        torch's by default.

    Raises ``TypeError`` or ``InputError`` for a wrong dtype or shape, ``IndexError`` for an index
    outside the table.
    """
    check.tensor("indices", indices, (torch.int64,))
    size = _checked_size((len(indices), *shape), flip, boxes, size)
    target = (len(indices), shape[0], *size)
    if out is None:
        out = torch.empty(target, dtype=form.dtype, memory_format=form.layout)
    check.target("out", out, form.dtype, target, indices.device, form.channels_last)
    scale, bias = form.affine(shape[0], indices.device)
    if dispatch.backend_for(indices.device) != "native":
        images = take_rows(table, indices, total).view(len(indices), *shape)
        return out.copy_(from_images(images, form, flip=flip, boxes=boxes, size=size))
    indices, flip = indices.contiguous(), None if flip is None else flip.contiguous()
    where = (
        table.addresses.data_ptr(),
        table.chunk_rows,
        total,
        table.stride,
        *shape,
        indices.data_ptr(),
        len(indices),
    )
    what = (
        dispatch.address(flip),
        scale.data_ptr(),
        bias.data_ptr(),
        dispatch.DTYPE_CODES[form.dtype],
        form.channels_last,
        out.data_ptr(),
        threads or torch.get_num_threads(),
    )
    native = dispatch.native_module()
    if boxes is None:
        inside = native.gather_chunks(*where, *what)
    else:
        boxes = boxes.contiguous()
        inside = native.crop_chunks(*where, boxes.data_ptr(), *size, *what)
    if not inside:
        check_indices(indices, total)
    return out


def _checked_size(
    images: Sequence[int], flip: Tensor | None, boxes: Tensor | None, size: tuple[int, int] | None
) -> tuple[int, int]:
    """The (height, width) of a batch out of ``images`` (B, C, H, W), after a look at what it is to
    be made with.
    """
    count, _, height, width = images
    if flip is not None:
        check.shaped("flip", check.tensor("flip", flip, (torch.bool,)), (count,))
    if boxes is not None:
        check.shaped("boxes", check.tensor("boxes", boxes, (torch.float32,)), (count, 4))
        if boxes.device == CPU and not bool((boxes[:, 2:] > 0).all() & boxes.isfinite().all()):
            raise InputError("boxes must be finite with heights and widths above 0")
    elif size not in (None, (height, width)):
        raise InputError(
            f"size = {size}, the images are {(height, width)}: another size needs boxes"
        )
    return size or (height, width)
