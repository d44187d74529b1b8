"""Rows out of a table of chunks: fixed-size records that lie in many separate blocks of memory, in
one pass.

    out[i] = chunk[index[i] div R] [offset + (index[i] mod R) * stride : ... + width]

R is the number of rows in a chunk.

One kernel reads all chunks through their addresses, so a batch costs one call however many chunks
it touches. On a GPU the addresses may be of pinned host memory as well, which the device reads in
place. Bytes: 2 B width + 8 B.

The operation is not registered with torch: a graph knows tensors, and no addresses.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import dispatch
from dpfast.ops.dispatch import CPU
from dpfast.ops.triton_stub import next_power, tl, triton


@dataclass(frozen=True)
class ChunkTable:
    """An immutable table of chunks, whose rows ``take_rows`` reads; it keeps the chunks alive.

    Attributes:
        chunk_rows: rows in a chunk.
        stride: bytes from one row to the next.
        chunks: uint8 blocks of at least chunk_rows * stride bytes.
        addresses: (n,) int64, of the chunks' first bytes.
        kinds: where chunks lie, such as "cpu", "pinned" and "cuda:0"; asking each is slow.
    """

    chunk_rows: int
    stride: int
    chunks: Sequence[Tensor] = ()
    addresses: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kinds: frozenset[str] = frozenset()

    def with_chunks(self, chunks: Iterable[Tensor]) -> ChunkTable:
        """Returns the same table over other chunks."""
        held = tuple(chunks)
        addresses = torch.tensor([chunk.data_ptr() for chunk in held], dtype=torch.int64)
        kinds = frozenset(map(kind_of, held))
        return replace(self, chunks=held, addresses=addresses, kinds=kinds)

    def block(self, chunk: int) -> Tensor:
        """Returns the (chunk_rows, stride) uint8 rows of one chunk, without a copy."""
        rows = self.chunks[chunk][: self.chunk_rows * self.stride]
        return rows.view(self.chunk_rows, self.stride)

    @property
    def on_host(self) -> bool:
        """True if the CPU can read all chunks in place."""
        return self.kinds <= {"cpu", "pinned"}

    def read_by(self, device: torch.device) -> bool:
        """Returns True if the kernels of a GPU read all chunks in place.

        Args:
            device: A GPU; "cuda" is the current one.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return dispatch.backend_for(device) == "triton" and self.kinds <= {str(device), "pinned"}


def kind_of(chunk: Tensor) -> str:
    """Returns the kind of memory of a chunk, as ``ChunkTable.kinds`` names it."""
    return "pinned" if chunk.is_pinned() else str(chunk.device)


def reference(
    table: ChunkTable, indices: Tensor, offset: int, width: int, device: torch.device = CPU
) -> Tensor:
    """Returns the formula chunk by chunk in plain PyTorch; chunks may lie on any devices."""
    out = torch.empty(len(indices), width, dtype=torch.uint8, device=device)
    numbers = indices // table.chunk_rows
    for number in numbers.unique().tolist():
        places = torch.nonzero(numbers == number).flatten()
        block = table.block(number)
        rows = (indices[places] - number * table.chunk_rows).to(block.device)
        out[places.to(device)] = block[rows, offset : offset + width].to(device)
    return out


@triton.jit
def chunk_rows_kernel(addresses, indices, out, chunk_rows, stride, words, BLOCK: tl.constexpr):
    """Copies BLOCK words of one row a program; a word is the element type of ``out``."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + row)
    start = tl.load(addresses + index // chunk_rows).to(out.dtype) + index % chunk_rows * stride
    tl.store(out + row * words + word, tl.load(start + word, mask=word < words), mask=word < words)


def launch(
    table: ChunkTable, indices: Tensor, offset: int, width: int, device: torch.device
) -> Tensor:
    """Returns the rows by the Triton kernel, on a device that reads all chunks: (B, width)
    uint8.
    """
    word = 4 if width % 4 == offset % 4 == table.stride % 4 == 0 else 1
    out = torch.empty(len(indices), width, dtype=torch.uint8, device=device)
    words = width // word
    block = min(max(next_power(words), 16), 2048)
    if out.numel():
        chunk_rows_kernel[(len(indices), -(-words // block))](
            (table.addresses + offset).to(device, non_blocking=True),
            indices.to(device, non_blocking=True),
            out.view(torch.int32) if word == 4 else out,
            table.chunk_rows,
            table.stride // word,
            words,
            block,
        )
    return out


def _native(
    table: ChunkTable,
    indices: Tensor,
    total: int,
    offset: int,
    width: int,
    out: Tensor | None,
    threads: int | None,
) -> Tensor:
    shape = (len(indices), width)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8)
    elif out.shape != shape or out.dtype != torch.uint8 or not out.is_contiguous():
        found = f"{out.dtype} {tuple(out.shape)}"
        raise InputError(f"out is {found}, expected contiguous uint8 {shape}")
    addresses = table.addresses + offset if offset else table.addresses
    inside = dispatch.native_module().rows(
        addresses.data_ptr(),
        table.chunk_rows,
        total,
        table.stride,
        width,
        indices.data_ptr(),
        len(indices),
        out.data_ptr(),
        threads or torch.get_num_threads(),
    )
    if not inside:
        check_indices(indices, total)
    return out


def check_indices(indices: Tensor, total: int) -> None:
    """Raises ``IndexError`` unless all of ``indices`` lie in [0, total)."""
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= total):
        found = f"{int(indices.min())}..{int(indices.max())}"
        raise IndexError(f"indices reach {found}, the table holds {total} samples")


def take_rows(
    table: ChunkTable,
    indices: Tensor,
    total: int,
    *,
    offset: int = 0,
    width: int | None = None,
    device: torch.device = CPU,
    out: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """Returns bytes ``offset`` to ``offset + width`` of the rows at ``indices``.

    Args:
        table: Chunks, on any devices.
        indices: (B,) int64 on the CPU.
        total: Rows in the table; the last chunk may have room for more.
        offset: First byte of a row to take.
        width: Bytes of a row to take, all of them by default.
        device: Device of the result.
        out: Tensor for the result, (B, width) uint8, contiguous, on ``device``.
        threads: Most threads of the native kernel, all of torch's by default.

    Returns:
        (B, width) uint8 on ``device``; ``out`` if given.

    Raises:
        IndexError: For an index outside [0, total).
        InputError: For an ``out`` of another kind.
    """
    width = table.stride if width is None else width
    indices = indices.contiguous()
    if device.type == "cpu" and dispatch.backend_for(CPU) == "native" and table.on_host:
        return _native(table, indices, total, offset, width, out, threads)
    check_indices(indices, total)
    if table.read_by(device):
        rows = launch(table, indices, offset, width, device)
    else:
        rows = reference(table, indices, offset, width, device)
    return rows if out is None else out.copy_(rows)
