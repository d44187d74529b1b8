"""The Triton kernels of ``group_norm`` and their launches; the formulas stand in ``__init__``.

The third launch of a pass goes through its programs backwards: what the first has read last is
still in the cache. Nothing is added atomically.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# ruff: noqa: RUF005 (kernels know no unpacking of tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dpfast.ops import dispatch
from dpfast.ops.layout import nhwc, nhwc_like
from dpfast.ops.triton_stub import next_power, tl, triton

WIDE = 16  # bytes of an access
WARPS = 8
CHANNELS = 64  # of a program, where there are as many: rows of 128 bytes in 16 bits
FORWARD, BACKWARD = 4, 2  # chunks, the most of which a thread holds the coefficients beside


@triton.jit
def _place(
    first,
    second,
    program,
    pixels,
    parts,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns what a program works on: one of the two tensors, its channels, where they begin in
    the concatenation; the program's channels, sample, part of the rows, and where that begins.
    """
    FIRST: tl.constexpr = (C1 + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = FIRST + (C2 + BLOCK - 1) // BLOCK
    block = program % BLOCKS
    part = (program // BLOCKS) % parts
    sample = (program // (BLOCKS * parts)).to(tl.int64)
    if C2 == 0:
        source, width, start = first, C1, 0
    else:
        in_first = block < FIRST
        source = tl.where(in_first, first, second)
        width = tl.where(in_first, C1, C2)
        start = tl.where(in_first, 0, C1)
        block = tl.where(in_first, block, block - FIRST)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    return source, width, start, channel, sample, part, sample * pixels + part * SPAN


@triton.jit
def _inside(chunk, left, channel, width, ROWS: tl.constexpr):
    row = chunk * ROWS + tl.arange(0, ROWS)
    return (row < left)[:, None] & (channel < width)[None, :]


@triton.jit
def _at(chunk, stride, channel, ROWS: tl.constexpr):
    row = chunk * ROWS + tl.arange(0, ROWS)
    return row[:, None] * stride + channel[None, :]


@triton.jit
def _load(base, stride, left, channel, width, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Loads all chunks of a program before it works on the first: as many accesses are in
    flight.
    """
    chunks = ()
    for i in tl.static_range(CHUNKS):
        inside = _inside(i, left, channel, width, ROWS)
        chunks = chunks + (tl.load(base + _at(i, stride, channel, ROWS), mask=inside, other=0.0),)
    return chunks


@triton.jit
def _pair(table, sample, column, inside, C: tl.constexpr):
    """Returns the two rows of a (B, 2, C) table."""
    at = table + sample * 2 * C + column
    return tl.load(at, mask=inside, other=0.0), tl.load(at + C, mask=inside, other=0.0)


@triton.jit
def _slope(z, dy, SILU: tl.constexpr):
    """Returns dz of dy."""
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@triton.jit(do_not_specialize=["pixels", "parts"])
def moments_kernel(
    first,
    second,
    partials,
    pixels,
    parts,
    C1: tl.constexpr,
    C2: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes means and squares around them (B, parts, 2, C) of ROWS * CHUNKS rows, which a program
    holds while it goes over them twice: nothing cancels.
    """
    SPAN: tl.constexpr = ROWS * CHUNKS
    source, width, start, channel, sample, part, row = _place(
        first, second, tl.program_id(0), pixels, parts, C1, C2, SPAN, BLOCK
    )
    left = pixels - part * SPAN
    chunks = _load(source + row * width, width, left, channel, width, ROWS, CHUNKS)
    total = chunks[0].to(tl.float32)
    for i in tl.static_range(1, CHUNKS):
        total += chunks[i].to(tl.float32)
    mean = tl.sum(total, axis=0) / tl.minimum(left, SPAN).to(tl.float32)
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in tl.static_range(CHUNKS):
        inside = _inside(i, left, channel, width, ROWS)
        distance = tl.where(inside, chunks[i].to(tl.float32) - mean[None, :], 0.0)
        squares += distance * distance
    target = partials + (sample * parts + part) * 2 * (C1 + C2) + start + channel
    tl.store(target, mean, mask=channel < width)
    tl.store(target + C1 + C2, tl.sum(squares, axis=0), mask=channel < width)


@triton.jit(do_not_specialize=["pixels", "parts", "span"])
def coefficients_kernel(
    partials,
    weight,
    bias,
    shift,
    coefficients,
    moments,
    pixels,
    parts,
    span,
    eps,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a and c (B, 2, C), mean and 1 / sqrt(var + eps) (B, 2, groups) of a group of GROUP
    channels.

    PARTS: how many parts are read at a time.
    """
    GROUPS: tl.constexpr = C // GROUP
    group = tl.program_id(0) % GROUPS
    sample = (tl.program_id(0) // GROUPS).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < GROUP
    channel = group * GROUP + lane
    moved = tl.zeros((BLOCK,), tl.float32)
    if shift is not None:
        at = shift + sample * SHIFT_STRIDE + channel
        moved += tl.load(at, mask=real, other=0.0).to(tl.float32)
    source = partials + sample * parts * 2 * C + channel[None, :]
    count = pixels.to(tl.float32) * GROUP
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & real[None, :]
        rows = tl.minimum(pixels - part * span, span).to(tl.float32)
        mean = tl.load(source + part * 2 * C, mask=inside, other=0.0)
        total += tl.where(inside, rows * (mean + moved[None, :]), 0.0)
    center = tl.sum(tl.sum(total, axis=0), axis=0) / count
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & real[None, :]
        rows = tl.minimum(pixels - part * span, span).to(tl.float32)
        mean = tl.load(source + part * 2 * C, mask=inside, other=0.0)
        squares = tl.load(source + part * 2 * C + C, mask=inside, other=0.0)
        distance = mean + moved[None, :] - center
        total += tl.where(inside, squares + rows * distance * distance, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(total, axis=0), axis=0) / count + eps)
    factor = tl.full((BLOCK,), 1.0, tl.float32) * inverse
    if weight is not None:
        factor *= tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    offset = (moved - center) * factor
    if bias is not None:
        offset += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    target = coefficients + sample * 2 * C + channel
    tl.store(target, factor, mask=real)
    tl.store(target + C, offset, mask=real)
    tl.store(moments + sample * 2 * GROUPS + group, center)
    tl.store(moments + sample * 2 * GROUPS + GROUPS + group, inverse)


@triton.jit(do_not_specialize=["pixels", "parts"])
def apply_kernel(
    first,
    second,
    coefficients,
    out,
    pixels,
    parts,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes y of ROWS * CHUNKS rows, the last ones first."""
    C: tl.constexpr = C1 + C2
    SPAN: tl.constexpr = ROWS * CHUNKS
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    source, width, start, channel, sample, part, row = _place(
        first, second, program, pixels, parts, C1, C2, SPAN, BLOCK
    )
    left = pixels - part * SPAN
    chunks = _load(source + row * width, width, left, channel, width, ROWS, CHUNKS)
    factor, offset = _pair(coefficients, sample, start + channel, channel < width, C)
    target = out + row * C + start
    for i in tl.static_range(CHUNKS):
        z = chunks[i].to(tl.float32) * factor[None, :] + offset[None, :]
        if SILU:
            z = z / (1.0 + tl.exp(-z))
        inside = _inside(i, left, channel, width, ROWS)
        tl.store(target + _at(i, C, channel, ROWS), z.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "parts"])
def backward_sums_kernel(
    first,
    second,
    dy,
    coefficients,
    bias,
    partials,
    pixels,
    parts,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the sums (B, parts, 2, C) of dz and dz (z - b) over ROWS * CHUNKS rows."""
    C: tl.constexpr = C1 + C2
    SPAN: tl.constexpr = ROWS * CHUNKS
    source, width, start, channel, sample, part, row = _place(
        first, second, tl.program_id(0), pixels, parts, C1, C2, SPAN, BLOCK
    )
    left = pixels - part * SPAN
    chunks = _load(source + row * width, width, left, channel, width, ROWS, CHUNKS)
    slopes = _load(dy + row * C + start, C, left, channel, width, ROWS, CHUNKS)
    real = channel < width
    factor, offset = _pair(coefficients, sample, start + channel, real, C)
    plain = tl.zeros((ROWS, BLOCK), tl.float32)
    along = tl.zeros((ROWS, BLOCK), tl.float32)
    if bias is not None:
        origin = tl.load(bias + start + channel, mask=real, other=0.0).to(tl.float32)
    for i in tl.static_range(CHUNKS):
        z = chunks[i].to(tl.float32) * factor[None, :] + offset[None, :]
        dz = _slope(z, slopes[i].to(tl.float32), SILU)
        if bias is not None:
            z -= origin[None, :]
        plain += dz
        along += dz * z
    target = partials + (sample * parts + part) * 2 * C + start + channel
    tl.store(target, tl.sum(plain, axis=0), mask=real)
    tl.store(target + C, tl.sum(along, axis=0), mask=real)


@triton.jit(do_not_specialize=["pixels", "parts"])
def backward_coefficients_kernel(
    partials,
    weight,
    shift,
    moments,
    coefficients,
    pixels,
    parts,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes k and l (B, 2, C) of a group of GROUP channels; PARTS: how many parts are read at a
    time.
    """
    GROUPS: tl.constexpr = C // GROUP
    group = tl.program_id(0) % GROUPS
    sample = (tl.program_id(0) // GROUPS).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    real = lane < GROUP
    channel = group * GROUP + lane
    source = partials + sample * parts * 2 * C + channel[None, :]
    plain = tl.zeros((PARTS, BLOCK), tl.float32)
    along = tl.zeros((PARTS, BLOCK), tl.float32)
    for begin in range(0, parts, PARTS):
        part = begin + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & real[None, :]
        plain += tl.load(source + part * 2 * C, mask=inside, other=0.0)
        along += tl.load(source + part * 2 * C + C, mask=inside, other=0.0)
    total = tl.sum(plain, axis=0)
    if weight is not None:
        total *= tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    count = pixels.to(tl.float32) * GROUP
    center = tl.load(moments + sample * 2 * GROUPS + group)
    inverse = tl.load(moments + sample * 2 * GROUPS + GROUPS + group)
    linear = -inverse * inverse * tl.sum(tl.sum(along, axis=0), axis=0) / count
    moved = tl.zeros((BLOCK,), tl.float32) - center
    if shift is not None:
        at = shift + sample * SHIFT_STRIDE + channel
        moved += tl.load(at, mask=real, other=0.0).to(tl.float32)
    constant = linear * moved - inverse * tl.sum(total, axis=0) / count
    target = coefficients + sample * 2 * C + channel
    tl.store(target, tl.zeros((BLOCK,), tl.float32) + linear, mask=real)
    tl.store(target + C, constant, mask=real)


@triton.jit(do_not_specialize=["pixels", "parts"])
def backward_kernel(
    first,
    second,
    dy,
    coefficients,
    gradients,
    vfirst,
    vsecond,
    dfirst,
    dsecond,
    pixels,
    parts,
    C1: tl.constexpr,
    C2: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes dx of ROWS * CHUNKS rows, the last ones first; `gradients` are k and l (B, 2, C)."""
    C: tl.constexpr = C1 + C2
    SPAN: tl.constexpr = ROWS * CHUNKS
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    source, width, start, channel, sample, part, row = _place(
        first, second, program, pixels, parts, C1, C2, SPAN, BLOCK
    )
    left = pixels - part * SPAN
    chunks = _load(source + row * width, width, left, channel, width, ROWS, CHUNKS)
    slopes = _load(dy + row * C + start, C, left, channel, width, ROWS, CHUNKS)
    real = channel < width
    factor, offset = _pair(coefficients, sample, start + channel, real, C)
    linear, constant = _pair(gradients, sample, start + channel, real, C)
    target = (dfirst if C2 == 0 else tl.where(start == 0, dfirst, dsecond)) + row * width
    if vfirst is not None:
        more = (vfirst if C2 == 0 else tl.where(start == 0, vfirst, vsecond)) + row * width
    for i in tl.static_range(CHUNKS):
        x = chunks[i].to(tl.float32)
        dz = _slope(x * factor[None, :] + offset[None, :], slopes[i].to(tl.float32), SILU)
        dx = factor[None, :] * dz + (linear[None, :] * x + constant[None, :])
        inside = _inside(i, left, channel, width, ROWS)
        at = _at(i, width, channel, ROWS)
        if vfirst is not None:
            dx += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + at, dx.to(dfirst.dtype.element_ty), mask=inside)


def settings(channels: int, pixels: int, itemsize: int, backward: bool) -> tuple[int, int, int]:
    """Returns rows of a chunk, chunks and channels of a program: a thread takes 16 bytes of each
    chunk.

    channels: of the wider of two sources. A sample's sums are parted by its own size alone, so its
    bits depend on no other's. The audit shows that no setting spills.
    """
    block = min(next_power(channels), CHANNELS)
    rows = max(1, WARPS * 32 * WIDE // itemsize // block)
    most = BACKWARD if backward else FORWARD
    return rows, min(next_power(-(-pixels // rows)), most), block


def group_settings(group: int, parts: int) -> tuple[int, int]:
    """Returns parts that the launch in the middle reads at a time, and the lanes of a group's
    channels.
    """
    block = next_power(group)
    return min(next_power(parts), max(1, 1024 // block)), block


def bytes_moved(
    samples: int,
    channels: tuple[int, ...],
    pixels: int,
    itemsize: int,
    *,
    backward: bool = False,
    more: bool = False,
) -> tuple[int, int, int]:
    """Returns the bytes that each of the three launches reads and writes, but for vectors of a
    channel or a group.

    channels: of each source. more: whether a gradient reaches the sources from elsewhere.
    """
    rows, chunks, _ = settings(max(channels), pixels, itemsize, backward)
    columns = samples * sum(channels)
    tensor = columns * pixels * itemsize
    partials = columns * -(-pixels // (rows * chunks)) * 8
    pair = columns * 8  # a and c, or k and l
    if backward:
        return 2 * tensor + pair + partials, partials + pair, (3 + more) * tensor + 2 * pair
    return tensor + partials, partials + pair, 2 * tensor + pair


class _Cut(NamedTuple):
    """The cut of a pass's launches into programs."""

    pixels: int
    parts: int
    c1: int
    c2: int
    tile: tuple[int, int, int]
    programs: tuple[int]

    @classmethod
    def of(cls, first: Tensor, second: Tensor | None, backward: bool) -> _Cut:
        pixels = math.prod(first.shape[2:])
        c1, c2 = first.shape[1], 0 if second is None else second.shape[1]
        rows, chunks, block = settings(max(c1, c2), pixels, first.element_size(), backward)
        parts = -(-pixels // (rows * chunks))
        blocks = -(-c1 // block) + -(-c2 // block)
        return cls(pixels, parts, c1, c2, (rows, chunks, block), (len(first) * parts * blocks,))

    def single(self) -> _Cut:
        """Returns the same in programs of one chunk."""
        rows, _, block = self.tile
        parts = -(-self.pixels // rows)
        programs = self.programs[0] // self.parts * parts
        return self._replace(parts=parts, tile=(rows, 1, block), programs=(programs,))

    @property
    def span(self) -> int:
        return self.tile[0] * self.tile[1]


def rows_of(x: Tensor) -> Tensor:
    """Returns x as a kernel reads it: in NHWC from a multiple of 16 bytes on. From elsewhere the
    compiler would read narrower, and add up in another order.
    """
    x = nhwc(x)
    return x if x.data_ptr() % WIDE == 0 else x.clone()


def table(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty((len(x), *shape), dtype=torch.float32)


def forward(
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the coefficients a and c (B, 2, C), and mean and 1 / sqrt(var + eps) (B, 2,
    groups).
    """
    first, second = rows_of(first), None if second is None else rows_of(second)
    weight, bias, shift = map(dispatch.contiguous, (weight, bias, shift))
    cut = _Cut.of(first, second, backward=False)
    channels = cut.c1 + cut.c2
    out = nhwc_like(first, channels)
    coefficients, moments = table(first, 2, channels), table(first, 2, groups)
    if out.numel() == 0:
        return out, coefficients, moments
    partials = table(first, cut.parts, 2, channels)
    sizes = (cut.pixels, cut.parts)
    tile = {"num_warps": WARPS}
    moments_kernel[cut.programs](first, second, partials, *sizes, cut.c1, cut.c2, *cut.tile, **tile)
    coefficients_kernel[(len(first) * groups,)](
        partials,
        weight,
        bias,
        shift,
        coefficients,
        moments,
        *sizes,
        cut.span,
        eps,
        channels,
        channels // groups,
        _stride(shift),
        *group_settings(channels // groups, cut.parts),
    )
    apply_kernel[cut.programs](
        first, second, coefficients, out, *sizes, cut.c1, cut.c2, silu, *cut.tile, **tile
    )
    return out, coefficients, moments


def backward(
    dy: Tensor,
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    coefficients: Tensor,
    moments: Tensor,
    silu: bool,
    vfirst: Tensor | None = None,
    vsecond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both sources, the second one empty where there is none; with those
    that reach them from elsewhere.
    """
    dy, first, second = rows_of(dy), rows_of(first), None if second is None else rows_of(second)
    vfirst, vsecond = (None if v is None else rows_of(v) for v in (vfirst, vsecond))
    weight, bias, shift = map(dispatch.contiguous, (weight, bias, shift))
    cut = _Cut.of(first, second, backward=True)
    channels, groups = cut.c1 + cut.c2, moments.shape[2]
    dfirst, dsecond = nhwc_like(first, cut.c1), nhwc_like(first, cut.c2)
    if dy.numel() == 0:
        return dfirst, dsecond
    partials, gradients = table(first, cut.parts, 2, channels), torch.empty_like(coefficients)
    sizes = (cut.pixels, cut.parts)
    sources = (first, second, dy, coefficients)
    tail = (*sizes, cut.c1, cut.c2, silu, *cut.tile)
    backward_sums_kernel[cut.programs](*sources, bias, partials, *tail, num_warps=WARPS)
    backward_coefficients_kernel[(len(first) * groups,)](
        partials,
        weight,
        shift,
        moments,
        gradients,
        *sizes,
        channels,
        channels // groups,
        _stride(shift),
        *group_settings(channels // groups, cut.parts),
    )
    if vfirst is not None:  # it takes the registers of the second chunk
        cut = cut.single()
        tail = (cut.pixels, cut.parts, cut.c1, cut.c2, silu, *cut.tile)
    backward_kernel[cut.programs](
        *sources, gradients, vfirst, vsecond, dfirst, dsecond, *tail, num_warps=WARPS
    )
    return dfirst, dsecond


def _stride(shift: Tensor | None) -> int:
    """Returns the distance from the shift of a sample to that of the next."""
    return shift.shape[1] if shift is not None and shift.dim() == 2 else 0
