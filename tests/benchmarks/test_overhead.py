"""What is measured beside the work of a run: the bookkeeping of a pool of any size, and the
manifest that it writes.
"""

import json

import pytest

from benchmarks import ROOT
from benchmarks.systems import overhead
from dpfast.pool.shards import Manifest, Shard

DOCUMENT = ROOT / "docs" / "records" / "scaling.md"


def test_the_bookkeeping_is_measured_on_a_pool_of_that_size(monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "SIZES", (200, 400))
    monkeypatch.setattr(overhead, "SHARD", 100)
    monkeypatch.setattr(overhead, "BATCH", 50)
    monkeypatch.setattr(overhead, "DEALT", 25)
    first, second = overhead.bookkeeping(2)
    # each size, and two shards that are measured
    assert (first["samples"], second["samples"]) == (
        400,
        600,
    )
    assert second["chunks"] == -(-600 // (overhead.CHUNK // overhead.PAYLOAD))
    assert min(second["microseconds"].values()) > 0
    assert second["manifest_bytes"] > first["manifest_bytes"]


def test_the_sum_over_all_manifests_of_a_run_is_that_of_writing_each(monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "RUNS", {"small": (10_000, 100)})
    (found,) = overhead.manifests(1)
    shards = [overhead.shard_like_those_of_ranks(i, 100) for i in range(100)]
    total = 0
    for held in range(1, 101):
        Manifest("pixels", [3, 224, 224], "npy", None, shards[:held]).write(tmp_path)
        total += (tmp_path / "manifest.json").stat().st_size
    assert found["shards"] == 100
    assert found["bytes"] == pytest.approx(total, rel=0.02)
    assert found["seconds"] > 0
    assert "| small | 100 |" in overhead.table([found])


def test_the_documented_sums_of_manifests_are_those_of_the_record():
    rows = [cells(line) for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    records = [json.loads(line) for line in overhead.RECORDS.read_text().splitlines()]
    sums = [record for record in records if record["part"] == "manifest"][-len(overhead.RUNS) :]
    assert [record["run"] for record in sums] == list(overhead.RUNS)
    table = [cells(line) for line in overhead.table(sums).splitlines()[3:]]
    assert all(row in rows for row in table)


@pytest.mark.parametrize("shards", [0, 3])
def test_a_manifest_is_read_as_it_was_written(shards, tmp_path):
    made = [Shard(f"shard-{i:06d}.tar", 10, 5, "a", "b", [[0, 4], [9, 13]]) for i in range(shards)]
    manifest = Manifest("pixels", [3, 2, 2], "npy", ["cat"], made, made[:1])
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["shards"] == [
        vars_of(shard) for shard in made
    ]
    assert manifest.next_name() == f"shard-{shards:06d}.tar"


def vars_of(shard):
    return {
        name: getattr(shard, name)
        for name in ("name", "samples", "bytes", "sha256", "columns_sha256", "ids")
    }


def last(name):
    return json.loads((overhead.RECORDS.with_name(name)).read_text().splitlines()[-1])


def cells(row):
    return [cell.strip().replace(" %", "%").replace(",", "") for cell in row.strip("|").split("|")]


def test_the_documented_efficiencies_are_those_of_the_record():
    rows = [cells(line) for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    for row in last("scaling.jsonl")["measured"]:
        if row["ranks"] >= 8:
            names = ("generation", "training", "evaluation", "seconds", "overlapped")
            assert [str(row["ranks"]), *(f"{row[name]:.0%}" for name in names)] in rows


def test_the_documented_bookkeeping_is_that_of_the_record():
    rows = [cells(line) for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    records = [json.loads(line) for line in overhead.RECORDS.read_text().splitlines()]
    books = [record for record in records if record["part"] == "bookkeeping"][
        -len(overhead.SIZES) :
    ]
    for record in books:
        append, order, save = record["microseconds"].values()
        (row,) = [row for row in rows if row[0] == str(record["samples"])]
        assert [row[1], *row[3:]] == [
            str(record["chunks"]),
            f"{append:.2f}",
            f"{order:.2f}",
            f"{save:.1f}",
        ]
    assert overhead.missed(books) == []
