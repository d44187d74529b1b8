"""Tables of chunks that grow: each keeps its own chunks, and few copies are made."""

import pytest
import torch

from dpfast.ops.chunk_rows import ChunkTable, take_rows
from dpfast.pool.shared_list import with_chunk


def test_a_table_grows_by_a_chunk_without_a_look_at_the_others():
    chunks = [torch.randint(0, 256, (24,), dtype=torch.uint8) for _ in range(3)]
    table = ChunkTable(7, 3).with_chunks(chunks)
    grown = ChunkTable(7, 3)
    for chunk in table.chunks:
        before, grown = grown, with_chunk(grown, chunk)
        # Readers keep what they have.
        assert len(before.chunks) == len(before.addresses) == len(grown.chunks) - 1
    assert torch.equal(grown.addresses, table.addresses)
    assert grown.kinds == table.kinds
    marked = ChunkTable(7, 3, chunks[:1], torch.tensor([5]), frozenset({"elsewhere"}))
    marked = with_chunk(marked, chunks[1])
    assert marked.addresses.tolist() == [5, chunks[1].data_ptr()]
    assert marked.kinds == {"elsewhere", "cpu"}


def test_tables_that_grow_out_of_one_keep_their_own_chunks():
    chunks = [torch.full((6,), i, dtype=torch.uint8) for i in range(40)]
    trunk, tables = ChunkTable(2, 3), []
    for number, chunk in enumerate(chunks):
        tables.append((trunk, list(range(number))))
        grown = with_chunk(trunk, chunk)
        if number % 3 == 1:  # an append that failed behind it, and was dropped or kept by a reader
            other = with_chunk(trunk, chunks[0])
            tables.append((other, [*range(number), 0]))
        trunk = grown
    for table, expected in [*tables, (trunk, list(range(40)))]:
        rows = torch.arange(2 * len(expected))
        assert take_rows(table, rows, len(rows))[:, 0].tolist() == [
            i for i in expected for _ in range(2)
        ]
        assert [int(chunk[0]) for chunk in table.chunks] == expected
        assert len(table.addresses) == len(table.chunks) == len(expected)
        assert [int(chunk[0]) for chunk in table.chunks[1:]] == expected[1:]
        with pytest.raises(IndexError):
            table.chunks[len(expected)]


def test_a_growing_table_copies_its_addresses_seldom():
    table, rooms = ChunkTable(2, 3), set()
    for _ in range(1000):
        table = with_chunk(table, torch.zeros(6, dtype=torch.uint8))
        rooms.add(table.addresses.data_ptr())
    assert len(rooms) <= 10  # 1, 3, 7, ... 1023
