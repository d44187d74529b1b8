"""A batch out of images: whole ones or boxes of them, mirrored, resized, normalised, in one pass.

    out[b, c] = R_b (image[b, c] / 255 - mean[c]) / std[c] C_b^T

R_b (H', H) and C_b (W', W) are the identity for whole images. Else output j of n over a box
[start, start + length) is centred at x = start + (j + 1/2) length/n - 1/2. It weighs input k with
the triangle max(0, 1 - |k - x| / r), r = max(length/n, 1), normalised: bilinear where the box is
enlarged, free of aliases where it is shrunk, as Pillow, torch (``antialias=True``) and DALI
(``INTERP_TRIANGULAR``) do. Inputs beyond the image repeat its border, so a box of the image's size
at a whole offset is a shift; a mirrored sample has the rows of C_b in reverse.

Bytes: B C H W (1 + b_out) + 8 B for whole images. A box of h x w pixels is read once, and every
line of it is resampled once: B C (h w + b_out H' W').

The images lie in a tensor, or as rows of a table of chunks, which the kernels read in place. The
operation is not registered with torch: a graph knows tensors, and no addresses.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.chunk_rows import ChunkTable, check_indices, take_rows
from dpfast.ops.dispatch import CPU
from dpfast.ops.gather import constants, gather_batch
from dpfast.ops.triton_stub import tl, triton

BLOCK = 256  # output pixels of a program
WARPS = 4  # of a program


class StoredImages(NamedTuple):
    """Images of one shape that lie as rows of a table of chunks.

    Attributes:
        table: the chunks.
        total: images in the table.
        shape: (C, H, W) of each.
        dtype: uint8, or float32 in [0, 255].
    """

    table: ChunkTable
    total: int
    shape: Sequence[int]
    dtype: torch.dtype = torch.uint8

    @classmethod
    def of(cls, images: Tensor) -> StoredImages:
        """Returns (B, C, H, W) images as a table of one chunk, without a copy if contiguous."""
        count, *shape = images.shape
        rows = images.contiguous().view(torch.uint8).flatten()
        stride = math.prod(shape) * images.dtype.itemsize
        table = ChunkTable(max(count, 1), stride).with_chunks([rows])
        return cls(table, count, shape, images.dtype)

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Returns copies of the images at ``indices``, (B, C, H, W) on ``device``."""
        rows = take_rows(self.table, indices, self.total, device=device)
        return rows.view(self.dtype).view(len(indices), *self.shape)


class Transform(NamedTuple):
    """The transform of an image: its box (None: all of it), a mirror, the size, the affine map.

    boxes: (B, 4) float32 on the CPU. flip: (B,) bool. scale, bias: (C,) float32, byte * scale +
    bias. flip, scale and bias lie on the device of the batch.
    """

    boxes: Tensor | None
    flip: Tensor | None
    size: tuple[int, int]
    scale: Tensor
    bias: Tensor


def axis_weights(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Returns R_b of boxes [start, start + length), both (B,), over an axis: (B, outputs, inputs)
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
    """Returns R_b image C_b^T in plain PyTorch: (B, C, H, W) floating point to (B, C, *size).

    boxes: (B, 4) float32 of (top, left, height, width) in pixels, on the CPU; flip: (B,) bool
    on the images' device.
    """
    rows = axis_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size[0]).to(images)
    columns = axis_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size[1]).to(images)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns.mT[:, None]


def reference(images: Tensor, transform: Transform) -> Tensor:
    """Returns the formula in plain PyTorch: (B, C, H, W) of any dtype to (B, C, *size) float32."""
    boxes, flip, size, scale, bias = transform
    batch = images.float() * scale[:, None, None] + bias[:, None, None]
    if boxes is not None:
        return resample(batch, boxes, size, flip)
    return batch if flip is None else torch.where(flip[:, None, None, None], batch.flip(3), batch)


# A thread makes output pixels: it weighs the few inputs that their triangles cover and reads them
# where the chunks lie, in device memory or in pinned memory of the host. Neighbours share inputs,
# which the caches serve. Places are found in fp32: at 224 pixels a weight is off by up to 1e-5 of
# fp64's, and by nothing for whole boxes. Nothing waits for the device: how many inputs a triangle
# covers is a constant of a launch, found in the boxes while they are on the host.


@triton.jit
def _axis(start, length, output, OUTPUTS: tl.constexpr):
    """Returns centre and reach of the triangle of an output, and the first input that it covers."""
    step = length / OUTPUTS
    reach = tl.maximum(step, 1.0)
    centre = start + (output.to(tl.float32) + 0.5) * step - 0.5
    return centre, reach, tl.floor(centre - reach) + 1.0


@triton.jit
def _tap(first, tap, centre, reach, INPUTS: tl.constexpr):
    """Returns the weight of one covered input, and its place; inputs beyond the image repeat its
    border.
    """
    place = first + tap
    weight = tl.maximum(1.0 - tl.abs(place - centre) / reach, 0.0)
    return weight, tl.minimum(tl.maximum(place, 0.0), INPUTS - 1.0).to(tl.int32)


@triton.jit
def crop_kernel(
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
    """Writes BLOCK pixels of one image a program, all channels. ELEMENT is the type of the images,
    stride in bytes.
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
    top = tl.load(boxes + image * 4)
    left = tl.load(boxes + image * 4 + 1)
    height = tl.load(boxes + image * 4 + 2)
    width = tl.load(boxes + image * 4 + 3)
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
    """Returns the most inputs that one of ``outputs`` triangles covers over an axis of boxes of
    ``lengths`` (B,), on the CPU.

    Rounded up to a power of two: each number is a kernel of its own.
    """
    reach = max(float(lengths.max()) / outputs, 1.0) if len(lengths) else 1.0
    return 1 << (math.ceil(2 * reach) - 1).bit_length()


def _triton(images: StoredImages, indices: Tensor, transform: Transform, out: Tensor) -> None:
    """Writes ``out`` (B, C, *size), contiguous or channels last, on a GPU that reads the table.

    Boxes must be given.
    """
    check_indices(indices, images.total)
    if not out.numel():
        return
    boxes, flip, (lines, columns), scale, bias = transform
    assert boxes is not None
    device = out.device
    crop_kernel[(len(out), -(-lines * columns // BLOCK))](
        images.table.addresses.to(device, non_blocking=True),
        indices.contiguous().to(device, non_blocking=True),
        boxes.contiguous().to(device, non_blocking=True),
        None if flip is None else flip.contiguous().view(torch.uint8),
        scale,
        bias,
        out,
        images.table.chunk_rows,
        images.table.stride,
        *images.shape,
        lines,
        columns,
        taps(boxes[:, 2], lines),
        taps(boxes[:, 3], columns),
        not out.is_contiguous(),
        tl.uint8 if images.dtype == torch.uint8 else tl.float32,
        BLOCK,
        num_warps=WARPS,
    )


def _native(
    images: StoredImages,
    indices: Tensor,
    transform: Transform,
    out: Tensor,
    channels_last: bool,
    threads: int | None,
) -> None:
    """Writes ``out``. The kernel reads the images where they lie and holds no lock of Python."""
    boxes, flip, size, scale, bias = transform
    # These names keep the tensors alive until the kernel has read them.
    indices = indices.contiguous()
    flip = dispatch.contiguous(flip)
    boxes = dispatch.contiguous(boxes)
    where = (
        images.table.addresses.data_ptr(),
        images.table.chunk_rows,
        images.total,
        images.table.stride,
        *images.shape,
        indices.data_ptr(),
        len(indices),
    )
    what = (
        dispatch.address(flip),
        scale.data_ptr(),
        bias.data_ptr(),
        dispatch.DTYPE_CODES[out.dtype],
        channels_last,
        out.data_ptr(),
        threads or torch.get_num_threads(),
    )
    native = dispatch.native_module()
    if boxes is None:
        inside = native.gather_chunks(*where, *what)
    else:
        inside = native.crop_chunks(*where, boxes.data_ptr(), *size, *what)
    if not inside:
        check_indices(indices, images.total)


def _has_kernel(dtype: torch.dtype, boxes: Tensor | None, device: torch.device) -> bool:
    """Returns True if a kernel makes such a batch: the native one takes bytes, Triton's takes
    boxes.
    """
    backend = dispatch.backend_for(device)
    if backend == "native":
        return dtype == torch.uint8
    return backend == "triton" and boxes is not None


def _in_place(images: StoredImages, boxes: Tensor | None, device: torch.device) -> bool:
    """Returns True if that kernel reads the images where they are stored."""
    if dispatch.backend_for(device) == "native":
        return images.dtype == torch.uint8 and images.table.on_host
    return boxes is not None and images.table.read_by(device)


def _checked_size(
    shape: Sequence[int], flip: Tensor | None, boxes: Tensor | None, size: tuple[int, int] | None
) -> tuple[int, int]:
    """Returns the (height, width) of a batch out of images (B, C, H, W), and whether it can be
    made.
    """
    count, _, height, width = shape
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


def crop_batch(
    images: Tensor | StoredImages,
    indices: Tensor | None = None,
    *,
    boxes: Tensor | None = None,
    flip: Tensor | None = None,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    device: torch.device = CPU,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Returns images, or boxes of them, as a normalised batch.

    Args:
        images: (B, C, H, W) uint8 or floats in [0, 255]; or stored ones, of which ``indices`` are
            taken.
        indices: (B,) int64 on the CPU for stored images, None for a tensor.
        boxes: (B, 4) float32 of (top, left, height, width) in pixels, on the CPU: the part of each
            image that is shown. None shows all of it, and so does a box of its size: the same bits
            in the native kernel.
        flip: (B,) bool on the batch's device, True mirrors an image left to right.
        size: (height, width) of the batch, that of the images by default; another one needs boxes.
        mean: One number for each channel, for pixels in [0, 1].
        std: One number for each channel, for pixels in [0, 1].
        dtype: fp32, fp16 or bf16 of the batch.
        channels_last: Memory layout of the batch.
        device: Device of a batch out of stored images; that of a tensor is the tensor's.
        out: Tensor for the batch, in its shape, dtype, layout and on its device.
        threads: Threads of the native kernel, all of torch's by default.

    Returns:
        (B, C, *size) of ``dtype``; ``out`` if given.

    Raises:
        IndexError: For an index outside the stored images.
        InputError: For a wrong shape, device or size.
        TypeError: For a wrong type or dtype.
    """
    if isinstance(images, StoredImages):
        indices = check.tensor("indices", indices, (torch.int64,), CPU)
        shape = (len(indices), *images.shape)
    else:
        shape = tuple(images.shape)
        device = images.device
        indices = torch.arange(len(images))
    size = _checked_size(shape, flip, boxes, size)
    target = (*shape[:2], *size)
    if out is not None:
        check.target("out", out, dtype, target, device, channels_last)
    transform = Transform(boxes, flip, size, *constants(mean, std, shape[1], device))
    layout = torch.channels_last if channels_last else torch.contiguous_format

    if isinstance(images, StoredImages) and not _in_place(images, boxes, device):
        images = images.take(indices, device)
        indices = torch.arange(len(images))
    if isinstance(images, Tensor) and _has_kernel(images.dtype, boxes, device):
        images = StoredImages.of(images if images.dtype == torch.uint8 else images.float())
    if isinstance(images, StoredImages):
        if out is None:
            out = torch.empty(target, dtype=dtype, device=device, memory_format=layout)
        if dispatch.backend_for(device) == "native":
            _native(images, indices, transform, out, channels_last, threads)
        else:
            _triton(images, indices, transform, out)
        return out
    if boxes is None and images.dtype == torch.uint8:
        return gather_batch(
            images,
            indices.to(device),
            flip=flip,
            mean=mean,
            std=std,
            dtype=dtype,
            channels_last=channels_last,
            out=out,
        )
    batch = reference(images, transform).to(dtype, memory_format=layout)
    return batch if out is None else out.copy_(batch)
