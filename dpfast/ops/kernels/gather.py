"""The Triton kernel of `gather_batch`: bytes in wide loads, interleaved and mirrored on the
chip.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
from torch import Tensor

from dpfast.ops.reference.gather import Request
from dpfast.ops.triton_stub import next_power, tl, triton

WARPS = 4  # of a program


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
    """PIXELS output pixels a program, of one plane or, in channels_last order, of all (PLANES, a
    power of two).

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
    """Bytes of a group, planes and pixels of a program, which loads 16 bytes a thread where there
    are as many.
    """
    group = math.gcd(width, 16)
    planes = next_power(channels) if channels_last else 1
    return group, planes, max(group, min(next_power(height * width), 2048 // planes))


def launch(request: Request, out: Tensor) -> None:
    """Writes the batch into `out`, which is contiguous or in channels_last memory."""
    if out.numel() == 0:
        return
    store, flip, channels_last = request.store, request.flip, not out.is_contiguous()
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
