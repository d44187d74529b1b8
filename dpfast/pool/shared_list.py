"""Sequences and tables of chunks that grow without a copy of what is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from dpfast.ops.chunk_rows import ChunkTable, kind_of

Item = TypeVar("Item")


class SharedList(Sequence[Item]):
    """The first items of a list that it shares with what has grown out of it; none of them ever
    changes.

    One thread at a time grows; any number read meanwhile.
    """

    __slots__ = ("_items", "_size")

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._items = list(items)
        self._size = len(self._items)

    @property
    def newest(self) -> bool:
        """True if nothing has grown out of it yet, so that ``plus`` copies nothing."""
        return len(self._items) == self._size

    def plus(self, item: Item) -> SharedList[Item]:
        """Returns the list with ``item`` at the end: in constant time, amortised, of the newest; of
        another by a copy.
        """
        grown: SharedList[Item] = SharedList.__new__(SharedList)
        grown._items = self._items if self.newest else self._items[: self._size]
        grown._items.append(item)
        grown._size = self._size + 1
        return grown

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Item]:
        return (self._items[i] for i in range(self._size))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        places = range(self._size)[index]
        return (
            self._items[places]
            if isinstance(places, int)
            else tuple(self._items[i] for i in places)
        )


def with_chunk(table: ChunkTable, chunk: Tensor) -> ChunkTable:
    """Returns ``table`` with another chunk, (n,) uint8, at the end; the others are not looked at.

    In constant time, amortised. Whoever holds the table before can still read it.
    """
    held = table.chunks
    chunks = held if isinstance(held, SharedList) else SharedList(held)
    size = len(chunks)
    room = table.addresses
    if chunks.newest and room.untyped_storage().nbytes() > room.nbytes:
        # Behind what this table and those before it read.
        room = room.as_strided((size + 1,), (1,))
    else:
        wider = np.empty(2 * size + 1, np.int64)
        wider[:size] = room.numpy()
        room = torch.from_numpy(wider)[: size + 1]
    room.numpy()[size] = chunk.data_ptr()
    kinds = table.kinds | {kind_of(chunk)}
    return replace(table, chunks=chunks.plus(chunk), addresses=room, kinds=kinds)
