"""What is measured beside the work of a run: the bookkeeping of a pool of any size, and the manifest that it writes."""

import json

import pytest

from benchmarks import overhead
from dpfast.pool.shards import Manifest, Shard


def test_the_bookkeeping_is_measured_on_a_pool_of_that_size(monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "SIZES", (200, 400))
    monkeypatch.setattr(overhead, "SHARD", 100)
    monkeypatch.setattr(overhead, "BATCH", 50)
    monkeypatch.setattr(overhead, "DEALT", 25)
    first, second = overhead.bookkeeping(2)
    assert (first["samples"], second["samples"]) == (400, 600)  # each size, and two shards that are measured
    assert second["chunks"] == -(-600 // (overhead.CHUNK // overhead.PAYLOAD))
    assert min(second["microseconds"].values()) > 0
    assert second["manifest_bytes"] > first["manifest_bytes"]


@pytest.mark.parametrize("shards", [0, 3])
def test_a_manifest_is_read_as_it_was_written(shards, tmp_path):
    made = [Shard(f"shard-{i:06d}.tar", 10, 5, "a", "b", [[0, 4], [9, 13]]) for i in range(shards)]
    manifest = Manifest("pixels", [3, 2, 2], "npy", ["cat"], made, made[:1])
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["shards"] == [vars_of(shard) for shard in made]
    assert manifest.next_name() == f"shard-{shards:06d}.tar"


def vars_of(shard):
    return {name: getattr(shard, name) for name in ("name", "samples", "bytes", "sha256", "columns_sha256", "ids")}
