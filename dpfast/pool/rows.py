"""Rows out of a table of chunks: fixed-size records that lie in many separate blocks of memory, in
one pass.

    out[i] = chunk[index[i] div R] [offset + (index[i] mod R) * stride : ... + width]

R is the number of rows in a chunk.

One kernel reads all chunks through their addresses, so a batch costs one call however many chunks
it touches. On a GPU the addresses may be of pinned host memory as well, which the device reads in
place. Bytes: 2 B width + 8 B.
"""

# Triton gives the parameters of a kernel their types when it is launched.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dpfast.ops import dispatch
from dpfast.ops.triton_stub import next_power, tl, triton
from dpfast.pool.shared_list import SharedList

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ChunkTable:
    """An immutable view of chunks; growing makes a new table that shares them. Whoever holds a
    table can read it.

    chunks: uint8 blocks; addresses: (n,) int64, of their first bytes; chunk_rows rows of ``stride``
    bytes in each.
    """

    chunk_rows: int
    stride: int
    chunks: SharedList[Tensor] = field(default_factory=SharedList)
    addresses: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kinds: frozenset[str] = (
        frozenset()
    )  # where chunks lie: "cpu", "pinned", "cuda:0"; asking each is slow

    def with_chunk(self, chunk: Tensor) -> ChunkTable:
        """Another chunk, (n,) uint8, at the end, in constant time, amortised; the others are not
        looked at again.
        """
        size, room = len(self.chunks), self.addresses
        if self.chunks.newest and room.untyped_storage().nbytes() > room.nbytes:
            room = room.as_strided(
                (size + 1,), (1,)
            )  # behind what this table and those before it read
        else:
            wider = np.empty(2 * size + 1, np.int64)
            wider[:size] = room.numpy()
            room = torch.from_numpy(wider)[: size + 1]
        room.numpy()[size] = chunk.data_ptr()
        kinds = self.kinds | {_kind(chunk)}
        return replace(self, chunks=self.chunks.plus(chunk), addresses=room, kinds=kinds)

    def with_chunks(self, chunks: Iterable[Tensor]) -> ChunkTable:
        """The same table over other chunks."""
        held = SharedList(chunks)
        addresses = torch.tensor([chunk.data_ptr() for chunk in held], dtype=torch.int64)
        return replace(self, chunks=held, addresses=addresses, kinds=frozenset(map(_kind, held)))

    def block(self, chunk: int) -> Tensor:
        """(chunk_rows, stride) uint8 rows of one chunk, no copy."""
        return self.chunks[chunk][: self.chunk_rows * self.stride].view(
            self.chunk_rows, self.stride
        )

    def take(
        self,
        indices: Tensor,
        total: int,
        *,
        offset: int = 0,
        width: int | None = None,
        device: torch.device = CPU,
        out: Tensor | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """Bytes ``offset`` to ``offset + width`` of the rows at ``indices``, on ``device``: (B,
        width) uint8.

        indices: (B,) int64 on the CPU. out: (B, width) uint8, contiguous, on ``device``. threads:
        of the native kernel at most, all of torch's by default. Raises ``IndexError`` for an index
        outside [0, total), ``ValueError`` for an ``out`` of another kind.
        """
        width = self.stride if width is None else width
        indices = indices.contiguous()
        if dispatch.backend_for(CPU) == "native" and device.type == "cpu" and self.on_host:
            return self._native(
                indices, total, offset, width, out, threads or torch.get_num_threads()
            )
        check_indices(indices, total)
        if self.read_by(device):
            rows = self._triton(indices, offset, width, device)
        else:
            rows = self.reference(indices, offset, width, device)
        return rows if out is None else out.copy_(rows)

    @property
    def on_host(self) -> bool:
        """Whether the CPU can read all chunks in place."""
        return self.kinds <= {"cpu", "pinned"}

    def read_by(self, device: torch.device) -> bool:
        """Whether the kernels of a GPU read all chunks in place; "cuda" is the current one."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return dispatch.backend_for(device) == "triton" and self.kinds <= {str(device), "pinned"}

    def reference(
        self, indices: Tensor, offset: int, width: int, device: torch.device = CPU
    ) -> Tensor:
        """The formula chunk by chunk in plain PyTorch; chunks may lie on any devices."""
        out = torch.empty(len(indices), width, dtype=torch.uint8, device=device)
        numbers = indices // self.chunk_rows
        for number in numbers.unique().tolist():
            places = torch.nonzero(numbers == number).flatten()
            block = self.block(number)
            rows = (indices[places] - number * self.chunk_rows).to(block.device)
            out[places.to(device)] = block[rows, offset : offset + width].to(device)
        return out

    def _native(
        self, indices: Tensor, total: int, offset: int, width: int, out: Tensor | None, threads: int
    ) -> Tensor:
        if out is None:
            out = torch.empty(len(indices), width, dtype=torch.uint8)
        elif (
            out.shape != (len(indices), width)
            or out.dtype != torch.uint8
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)}, expected contiguous uint8 "
                f"{len(indices), width}"
            )
        addresses = self.addresses + offset if offset else self.addresses
        inside = dispatch.native_module().rows(
            addresses.data_ptr(),
            self.chunk_rows,
            total,
            self.stride,
            width,
            indices.data_ptr(),
            len(indices),
            out.data_ptr(),
            threads,
        )
        if not inside:
            check_indices(indices, total)
        return out

    def _triton(self, indices: Tensor, offset: int, width: int, device: torch.device) -> Tensor:
        word = 4 if width % 4 == offset % 4 == self.stride % 4 == 0 else 1
        out = torch.empty(len(indices), width, dtype=torch.uint8, device=device)
        words = width // word
        block = min(max(next_power(words), 16), 2048)
        if out.numel():
            rows_kernel[(len(indices), -(-words // block))](
                (self.addresses + offset).to(device, non_blocking=True),
                indices.to(device, non_blocking=True),
                out.view(torch.int32) if word == 4 else out,
                self.chunk_rows,
                self.stride // word,
                words,
                block,
            )
        return out


@triton.jit
def rows_kernel(addresses, indices, out, chunk_rows, stride, words, BLOCK: tl.constexpr):
    """BLOCK words of one row a program; a word is the element type of ``out``."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + row)
    start = tl.load(addresses + index // chunk_rows).to(out.dtype) + index % chunk_rows * stride
    tl.store(out + row * words + word, tl.load(start + word, mask=word < words), mask=word < words)


def _kind(chunk: Tensor) -> str:
    return "pinned" if chunk.is_pinned() else str(chunk.device)


def check_indices(indices: Tensor, total: int) -> None:
    """Raises ``IndexError`` unless all of ``indices`` lie in [0, total)."""
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= total):
        raise IndexError(
            f"indices reach {int(indices.min())}..{int(indices.max())}, the pool holds {total} "
            "samples"
        )
