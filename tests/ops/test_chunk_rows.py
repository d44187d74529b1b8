"""Rows through a table of chunks: every backend reads the bytes that indexing gives."""

import pytest
import torch

from dpfast.ops import audit, dispatch
from dpfast.ops.chunk_rows import ChunkTable, chunk_rows_kernel, launch, take_rows


def table_of(rows, chunk_rows, stride):
    torch.manual_seed(0)
    count = -(-rows // chunk_rows)
    chunks = tuple(
        torch.randint(0, 256, (chunk_rows * stride + 3,), dtype=torch.uint8) for _ in range(count)
    )
    expected = torch.cat([c[: chunk_rows * stride].view(chunk_rows, stride) for c in chunks])
    return ChunkTable(chunk_rows, stride).with_chunks(chunks), expected


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("chunk_rows", "stride"), [(1, 1), (7, 3), (100, 56), (64, 512), (3, 40_000)]
)
def test_rows_are_those_of_indexing(backend, chunk_rows, stride, monkeypatch):
    if backend == "native" and dispatch.native() is None:
        pytest.skip("the native kernels are not built")
    monkeypatch.setattr(dispatch, "FORCED", backend)
    table, expected = table_of(200, chunk_rows, stride)
    indices = torch.randint(0, 200, (301,))
    assert torch.equal(take_rows(table, indices, 200), expected[indices])
    part = min(stride, 4)
    assert torch.equal(
        take_rows(table, indices, 200, offset=stride - part, width=part),
        expected[indices, stride - part :],
    )
    assert take_rows(table, indices[:0], 200).shape == (0, stride)
    for wrong in (-1, 200):
        with pytest.raises(IndexError, match="holds 200"):
            take_rows(table, torch.tensor([3, wrong]), 200)


def test_a_gpu_s_kernels_read_its_own_chunks_and_pinned_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    table = ChunkTable(7, 3, kinds=frozenset({"cuda:0", "pinned"}))
    assert table.read_by(torch.device("cuda"))
    assert table.read_by(torch.device("cuda", 0))
    assert not table.read_by(torch.device("cuda", 1))
    assert not ChunkTable(7, 3, kinds=frozenset({"cpu"})).read_by(torch.device("cuda"))


@pytest.mark.skipif(audit.missing() is not None, reason="the audit needs Triton's Linux wheel")
@pytest.mark.parametrize("word", ["i32", "u8"])
def test_the_gpu_s_kernel_keeps_everything_in_registers(word):
    pointers = {"addresses": "*i64", "indices": "*i64", "out": f"*{word}"}
    arguments = {**pointers, "chunk_rows": "i32", "stride": "i32", "words": "i32", "BLOCK": 2048}
    variant = audit.Variant(
        name="rows", kernel=chunk_rows_kernel, arguments=arguments, warps=4, reads=0, writes=0
    )
    for report in audit.audit([variant]):
        assert report.local_bytes == 0
        assert report.occupancy >= 0.5


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize(
    ("chunk_rows", "stride", "offset", "width"),
    [(7, 12, 0, 12), (7, 12, 4, 8), (5, 13, 2, 3), (2, 9000, 0, 9000)],
)
def test_the_gpu_s_kernel_reads_the_same_rows(chunk_rows, stride, offset, width):
    table, expected = table_of(20, chunk_rows, stride)
    indices = torch.tensor([19, 0, 7, 7, 13])
    table = ChunkTable(chunk_rows, stride).with_chunks(chunk.clone() for chunk in table.chunks)
    rows = launch(table, indices, offset, width, dispatch.CPU)
    assert torch.equal(rows, expected[indices, offset : offset + width])
