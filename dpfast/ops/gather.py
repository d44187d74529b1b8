"""A batch out of a store of uint8 images: chosen rows, optionally mirrored, normalised, in one
pass.

    batch[i, c, h, w] = (store[indices[i], c, h, w'] / 255 - mean[c]) / std[c]
    w' = W - 1 - w where flip[i], else w

Bytes: B C H W (1 + b_out) + 8 B.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check, dispatch
from dpfast.ops.triton_stub import next_power, tl, triton

WARPS = 4  # of a program


class Request(NamedTuple):
    """The parts that a batch is made of; `scale` and `bias` are one fp32 number for each channel:
    byte * scale + bias.
    """

    store: Tensor
    indices: Tensor
    flip: Tensor | None
    scale: Tensor
    bias: Tensor


def reference(request: Request) -> Tensor:
    """Returns the formula in plain PyTorch: a contiguous fp32 batch."""
    rows = request.store.index_select(0, request.indices).float()
    if request.flip is not None:
        rows = torch.where(request.flip[:, None, None, None], rows.flip(3), rows)
    return rows * request.scale[:, None, None] + request.bias[:, None, None]


@triton.jit
def gather_kernel(
    store,
    indices,
    flip,
    scale,
    bias,
    out,
    rows,
    row_stride,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FLIP: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Writes PIXELS output pixels a program, of one plane or, in channels_last order, of all
    (PLANES, a power of two).

    Bytes arrive in groups of GROUP, a divisor of the width, and so does a mirror image: the groups
    of a line are read in reverse order, and the bytes of a group are reversed on the chip, where
    channels are interleaved as well.
    """
    PLANE: tl.constexpr = HEIGHT * WIDTH
    COUNT: tl.constexpr = CHANNELS if CHANNELS_LAST else 1
    image = tl.program_id(0).to(tl.int64)
    first_pixel = tl.program_id(1) * PIXELS
    first_channel = 0 if CHANNELS_LAST else tl.program_id(2)
    index = tl.load(indices + image)
    legal = (index >= 0) & (index < rows)
    source = store + tl.where(legal, index, 0) * row_stride + first_channel * PLANE
    mirrored = tl.load(flip + image).to(tl.int32) if FLIP else 0

    plane = tl.arange(0, PLANES)[:, None, None]
    group = first_pixel // GROUP + tl.arange(0, PIXELS // GROUP)[None, :, None]
    # A product, not a choice, and of whole groups: the compiler can tell that every start is
    # aligned.
    start = (group + mirrored * (WIDTH // GROUP - 1 - 2 * (group % (WIDTH // GROUP)))) * GROUP
    inside = (plane < COUNT) & (group < PLANE // GROUP)
    lane = tl.arange(0, GROUP)[None, None, :]
    byte = tl.reshape(
        tl.load(source + (plane * PLANE + start + lane), mask=inside, other=0), (PLANES * PIXELS,)
    )

    element = tl.arange(0, PLANES * PIXELS)
    pixel, channel = element // COUNT, element % COUNT
    if FLIP or COUNT > 1:
        # The elements behind the last of COUNT * PIXELS are not stored; their index only has to
        # exist.
        here = tl.minimum(pixel, PIXELS - 1)
        if FLIP:
            here = here ^ (mirrored * (GROUP - 1))
        byte = tl.gather(byte, channel * PIXELS + here, 0)
    byte = byte.to(tl.float32)
    value = tl.full((PLANES * PIXELS,), 0.0, tl.float32)
    # A choice between results: two loads an element would be dearer, and a choice between factors
    # needs more registers.
    for c in tl.static_range(COUNT):
        factor, offset = tl.load(scale + first_channel + c), tl.load(bias + first_channel + c)
        value = tl.where(channel == c, byte * factor + offset, value)
    value = tl.where(legal, value, float("nan"))
    target = out + image * (CHANNELS * PLANE) + first_channel * PLANE + first_pixel * COUNT
    last = tl.minimum(PLANE - first_pixel, PIXELS) * COUNT
    tl.store(target + element, value.to(out.dtype.element_ty), mask=element < last)


def settings(channels: int, height: int, width: int, channels_last: bool) -> tuple[int, int, int]:
    """Returns bytes of a group, planes and pixels of a program, which loads 16 bytes a thread where
    there are as many.
    """
    group = math.gcd(width, 16)
    planes = next_power(channels) if channels_last else 1
    return group, planes, max(group, min(next_power(height * width), 2048 // planes))


def launch(request: Request, out: Tensor) -> None:
    """Writes the batch into `out`, which is contiguous or in channels_last memory."""
    if out.numel() == 0:
        return
    store = request.store
    flip = request.flip
    channels_last = not out.is_contiguous()
    channels, height, width = store.shape[1:]
    group, planes, pixels = settings(channels, height, width, channels_last)
    gather_kernel[(len(out), -(-height * width // pixels), 1 if channels_last else channels)](
        store,
        request.indices.contiguous(),
        None if flip is None else flip.contiguous().view(torch.uint8),
        request.scale,
        request.bias,
        out,
        store.shape[0],
        store.stride(0),
        channels,
        height,
        width,
        channels_last,
        flip is not None,
        group,
        planes,
        pixels,
        num_warps=WARPS,
    )


def _native(request: Request, out: Tensor) -> None:
    store = request.store
    indices = request.indices.contiguous()
    flip = dispatch.contiguous(request.flip)
    inside = dispatch.native_module().gather(
        store.data_ptr(),
        store.shape[0],
        store.stride(0),
        *store.shape[1:],
        indices.data_ptr(),
        indices.shape[0],
        dispatch.address(flip),
        request.scale.data_ptr(),
        request.bias.data_ptr(),
        dispatch.DTYPE_CODES[out.dtype],
        not out.is_contiguous(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if not inside:
        raise IndexError(
            f"indices of shape {tuple(indices.shape)} must "
            f"lie in [0, {store.shape[0]}), the store's rows"
        )


def _empty(request: Request, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(request.indices), *request.store.shape[1:])
    return torch.empty(shape, dtype=dtype, device=request.store.device, memory_format=layout)


def _run(request: Request, out: Tensor) -> Tensor:
    """Writes the batch into `out`, which is contiguous or in channels_last memory."""
    if not request.store[:1].is_contiguous():
        request = request._replace(store=request.store.contiguous())
    backend = dispatch.backend_for(out.device)
    if backend == "triton":
        launch(request, out)
    elif backend == "native":
        _native(request, out)
    else:
        out.copy_(reference(request))
    return out


@torch.library.custom_op("dpfast::gather_batch", mutates_args=())
def _operation(
    store: Tensor,
    indices: Tensor,
    flip: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    request = Request(store, indices, flip, scale, bias)
    return _run(request, _empty(request, dtype, channels_last))


@_operation.register_fake
def _(
    store: Tensor,
    indices: Tensor,
    flip: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return _empty(Request(store, indices, flip, scale, bias), dtype, channels_last)


def constants(
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    channels: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns the scale and bias of each channel, in fp32 after fp64 arithmetic: (C,) each."""
    if isinstance(mean, Tensor) or isinstance(std, Tensor) or dispatch.traced():
        return _affine(
            _vector("mean", mean, channels, device), _vector("std", std, channels, device)
        )
    return _cached_constants(_numbers("mean", mean), _numbers("std", std), channels, device)


@functools.lru_cache(maxsize=64)
def _cached_constants(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    return _affine(_vector("mean", mean, channels, device), _vector("std", std, channels, device))


def _affine(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    return (1.0 / (255.0 * std)).float(), (-mean / std).float()


def _vector(
    name: str, value: Sequence[float] | Tensor, channels: int, device: torch.device
) -> Tensor:
    if isinstance(value, Tensor):
        check.tensor(name, value, (*check.FLOATS, torch.float64), device)
        return check.shaped(name, value, (channels,)).double()
    numbers = _numbers(name, value)
    if len(numbers) != channels:
        raise InputError(
            f"{name} has {len(numbers)} values, expected one for each of {channels} channels"
        )
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _numbers(name: str, value: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a sequence of numbers or a tensor, got {value!r}"
        ) from None


def gather_batch(
    store: Tensor,
    indices: Tensor,
    *,
    flip: Tensor | None = None,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    dtype: torch.dtype,
    channels_last: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Gathers rows of a uint8 image store as a normalised batch.

    Args:
        store: (N, C, H, W) uint8; each row contiguous.
        indices: (B,) int64 in [0, N).
        flip: (B,) bool, True mirrors a row left to right; None mirrors none.
        mean: One number for each channel, for pixels in [0, 1]; a sequence or a (C,) tensor on the
            same device.
        std: One number for each channel, as ``mean``.
        dtype: fp32, fp16 or bf16 of the batch.
        channels_last: Memory layout of the batch.
        out: Tensor for the batch, in its shape, dtype and layout.

    Returns:
        (B, C, H, W) of ``dtype``, in channels_last or contiguous memory; ``out`` if given.

    Raises:
        IndexError: For an index outside the store, on a CPU; on a GPU, where the host cannot look,
            such a row is NaN.
        InputError: For a wrong shape or device.
        TypeError: For a wrong type or dtype.

    Examples:
        >>> import torch, dpfast
        >>> store = torch.full((5, 1, 2, 2), 255, dtype=torch.uint8)
        >>> batch = dpfast.gather_batch(
        ...     store,
        ...     torch.tensor([4]),
        ...     mean=[0.5],
        ...     std=[0.5],
        ...     dtype=torch.float32,
        ...     channels_last=False,
        ... )
        >>> batch.shape, batch.dtype
        (torch.Size([1, 1, 2, 2]), torch.float32)
    """
    check.tensor("store", store, (torch.uint8,))
    if store.dim() != 4:
        raise InputError(f"store has shape {tuple(store.shape)}, expected (N, C, H, W)")
    check.tensor("indices", indices, (torch.int64,), store.device)
    if indices.dim() != 1:
        raise InputError(f"indices has shape {tuple(indices.shape)}, expected (B,)")
    if flip is not None:
        check.shaped(
            "flip", check.tensor("flip", flip, (torch.bool,), store.device), tuple(indices.shape)
        )
    if dtype not in check.FLOATS:
        raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    scale, bias = constants(mean, std, store.shape[1], store.device)
    request = Request(store, indices, flip, scale, bias)
    if out is not None:
        check.target(
            "out", out, dtype, (len(indices), *store.shape[1:]), store.device, channels_last
        )
    if dispatch.traced():
        batch = _operation(*request, dtype, channels_last)
        return batch if out is None else out.copy_(batch)
    return _run(request, _empty(request, dtype, channels_last) if out is None else out)
