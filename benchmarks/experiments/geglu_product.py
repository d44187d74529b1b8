"""A GEGLU inside the product before it, so that its 8 C columns never exist.

    h = x W^T + b = [a, g],   y = a gelu(g),   gelu(g) = g (1 + erf(g / sqrt 2)) / 2

A program makes a tile of y: it sums the two products of the tile's columns, of a and of g, over the
same rows of x, adds the biases, and writes y alone. For rows of K inputs and C results of b bytes
it moves (K + C) b and once the weights; the library's product and ``ops.geglu`` move (K + 5 C) b.
Without a tape: a backward pass would need h.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import dispatch
from dpfast.ops.triton_stub import tl, triton

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)
GROUP = 8  # blocks of rows that share the weights of a block of columns in the cache


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of y in a program, inputs of a step of its sums, warps, and steps that are
    under way at once.
    """

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int

    def __str__(self) -> str:
        size = f"{self.rows} x {self.columns} x {self.inputs}"
        return f"{size}, {self.warps} warps, {self.stages} stages"


TILES = (Tiles(128, 128, 64, 8, 3), Tiles(128, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 3))


@triton.jit
def _dot(a, b, total):
    """a b + total; the interpreter knows no product of bf16, which is exact in fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total)


@triton.jit
def geglu_product_kernel(
    x,
    weight,
    bias,
    out,
    rows,
    C,
    K,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y of M x N elements. C is a multiple of N and K of STEP."""
    columns = C // N
    blocks = tl.cdiv(rows, M)
    group = tl.program_id(0) // (GROUP * columns)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inner = tl.program_id(0) % (GROUP * columns)
    row = (group * GROUP + inner % size) * M + tl.arange(0, M)
    column = (inner // size) * N + tl.arange(0, N)
    step = tl.arange(0, STEP)
    # rows beyond the last read it again and are not written: loads without a mask
    source = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * K + step[None, :]
    of_a = weight + column[None, :] * K + step[:, None]
    of_gate = of_a + C * K
    a = tl.zeros((M, N), tl.float32)
    gate = tl.zeros((M, N), tl.float32)
    for _ in range(0, K, STEP):
        part = tl.load(source)
        a = _dot(part, tl.load(of_a), a)
        gate = _dot(part, tl.load(of_gate), gate)
        source += STEP
        of_a += STEP
        of_gate += STEP
    a += tl.load(bias + column).to(tl.float32)[None, :]
    gate += tl.load(bias + C + column).to(tl.float32)[None, :]
    y = a * gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    target = out + row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=row[:, None] < rows)


def geglu_product(x: Tensor, weight: Tensor, bias: Tensor, tiles: Tiles = TILES[0]) -> Tensor:
    """``ops.geglu(F.linear(x, weight, bias))`` in one kernel, without a tape.

    Args:
        x: (..., K) fp16 or bf16, contiguous rows. weight: (2 C, K), bias: (2 C,), the gates last.

    Returns:
        (..., C) in x's dtype, rounded once.

    Raises:
        InputError: sizes that are no multiples of the tiles.
    """
    inputs, outputs = weight.shape[1], len(weight) // 2
    if outputs % tiles.columns or inputs % tiles.inputs:
        raise InputError(
            f"weight has shape {tuple(weight.shape)}: expected halves of multiples of "
            f"{tiles.columns} rows, and multiples of {tiles.inputs} columns"
        )
    flat, weight, bias = x.reshape(-1, inputs).contiguous(), weight.contiguous(), bias.contiguous()
    out = torch.empty(len(flat), outputs, dtype=x.dtype, device=x.device)
    if out.numel():
        programs = -(-len(flat) // tiles.rows) * (outputs // tiles.columns)
        geglu_product_kernel[(programs,)](
            *(flat, weight, bias, out, len(flat), outputs, inputs),
            *(tiles.rows, tiles.columns, tiles.inputs, GROUP),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out.unflatten(0, x.shape[:-1])


def bytes_moved(rows: int, inputs: int, outputs: int, itemsize: int, *, fused: bool) -> int:
    """Of activations: by the kernel here, or by a product and ``ops.geglu``."""
    return rows * (inputs + (1 if fused else 5) * outputs) * itemsize
