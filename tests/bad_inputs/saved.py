"""Saved pools, runs and checkpoints of which a file was damaged."""

from __future__ import annotations

import io
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dpfast.config import Recipe
from dpfast.learn.models import load_learner
from dpfast.pool.importing import import_pool
from dpfast.pool.pool import SamplePool
from dpfast.pool.record import from_dicts
from dpfast.pool.saver import Saver
from dpfast.pool.shards import LostSamplesWarning
from dpfast.practice import checkpoint
from dpfast.practice.checkpoint import Checkpoint, DamagedCheckpointWarning
from dpfast.report.runs import read_run
from tests.bad_inputs.case import NEVER, Case, generated, listed
from tests.bad_inputs.learners import pipeline

LEVELS = (3, 9, 27, 81)
LABELS = (1, 2, 0, 1)


def _save(folder: Path, images: str = "png") -> Path:
    """A saved pool of two shards of two samples."""
    pool = SamplePool()
    pixels = torch.tensor(LEVELS, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    rows = [{"sample_id": i, "label": label} for i, label in enumerate(LABELS)]
    pool.append_records(pixels.contiguous(), from_dicts(rows))
    with Saver(pool, folder, images=images, classes=["a", "b", "c"], shard_samples=2) as saver:
        saver.save()
        assert saver.wait() == 4
    return folder


def _open(folder: Path) -> Any:
    """(level, label) of each sample, the names of the classes, and what is said of lost ones."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pool, classes = import_pool(folder)
    assert all(w.category is LostSamplesWarning for w in seen)
    lost = [name for w in seen for name in ("000000", "000001") if name in str(w.message)]
    levels = pool.images(torch.arange(len(pool)))[:, 0, 0, 0].tolist() if len(pool) else []
    return list(zip(levels, pool.column("label").tolist(), strict=True)), classes, sorted(set(lost))


ALL = list(zip(LEVELS, LABELS, strict=True))
NAMES = ["a", "b", "c"]


@generated(2)
def pool(random: random.Random, folder: Path) -> Case:
    _save(folder / "pool", random.choice(["png", "npy"]))
    return Case(lambda: _open(folder / "pool"), ("pool",), (ALL, NAMES, []), valid=True)


def manifest(change: Callable[[dict[str, Any]], Any], random: random.Random, folder: Path) -> Case:
    """A manifest that was written by hand."""
    path = _save(folder / "pool") / "manifest.json"
    table = json.loads(path.read_bytes())
    found = change(table)
    data = found if isinstance(found, bytes) else json.dumps(found or table).encode()
    path.write_bytes(data)
    right: Any = {  # what does not bear on the samples, or takes a shard with it
        "suffix": (ALL, NAMES, []),
        "lost": (ALL[2:], NAMES, ["000000"]),
    }.get(getattr(change, "leaves", ""), NEVER)
    return Case(lambda: _open(folder / "pool"), ("manifest.json", "shard-"), right)


def _leaving(leaves: str, change: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    change.leaves = leaves
    return change


def _with(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda table: table | values


def _first(**values: Any) -> Callable[[dict[str, Any]], Any]:
    """Values of the first shard."""
    return lambda table: table | {"shards": [table["shards"][0] | values, *table["shards"][1:]]}


listed(
    "saved",
    {
        "empty": lambda table: b"\n",
        "torn": lambda table: json.dumps(table).encode()[:200],
        "list": lambda table: [table],
        "null": lambda table: b"null",
        "text": lambda table: b'"manifest"',
        "utf-16": lambda table: json.dumps(table).encode("utf-16"),
        "deep": lambda table: b"[" * 100_000,
        "version": _with(version=99),
        "format": _with(format="zip"),
        "codec": _with(codec="wavelets"),
        "codec-null": _with(codec=None),
        "codec-list": _with(codec=["pixels"]),
        "suffix": _leaving("suffix", _with(suffix="exe")),
        "suffix-null": _leaving("suffix", _with(suffix=None)),
        "classes-text": _with(classes="abc"),
        "classes-numbers": _with(classes=[1, 2, 3]),
        "classes-too-few": _with(classes=["a"]),
        "unknown-key": _with(wavelets=1),
        "shards-null": _with(shards=None),
        "shards-table": _with(shards={}),
        "shards-of-text": _with(shards=["shard-000000.tar"]),
        "shard-outside": _first(name="../shard-000000.tar"),
        "shard-absolute": _first(name="/etc/passwd"),
        "shard-name-null": _first(name=None),
        "shard-name-odd": _first(name="shard-zero.tar"),
        "shard-samples-text": _first(samples="2"),
        "shard-samples-negative": _leaving("lost", _first(samples=-2)),
        "shard-bytes-null": _leaving("lost", _first(bytes=None)),
        "shard-ids-text": _first(ids="0-1"),
        "shard-ids-numbers": _first(ids=[0, 1]),
        "shard-twice": lambda table: table | {"shards": [*table["shards"], table["shards"][0]]},
        "no-shards-key": lambda table: {k: v for k, v in table.items() if k != "shards"},
    },
    manifest,
)


def shard(kind: str, random: random.Random, folder: Path) -> Case:
    """A file of a shard that is not what the manifest promises: its samples are lost and named, or
    come from the other file.
    """
    saved = _save(folder / "pool", random.choice(["png", "npy"]))
    number = random.randrange(2)
    tar, columns = (saved / f"shard-{number:06d}{s}" for s in (".tar", ".columns.npy"))
    data = bytearray(tar.read_bytes())
    lost = [f"{number:06d}"]
    if kind == "missing":
        tar.unlink()
    elif kind == "torn":
        tar.write_bytes(data[: random.randrange(1, len(data))])
    elif kind == "empty":
        tar.write_bytes(b"")
    elif kind == "byte":
        data[random.randrange(len(data))] ^= 1
        tar.write_bytes(data)
    elif kind == "folder":
        tar.unlink()
        tar.mkdir()
    else:
        lost = []
        if kind == "columns-missing":
            columns.unlink()
        elif kind == "columns-torn":
            columns.write_bytes(columns.read_bytes()[:-30])
        elif kind == "columns-folder":
            columns.unlink()
            columns.mkdir()
    left = ALL if not lost else ALL[2:] if number == 0 else ALL[:2]
    right = (left, NAMES, lost)
    return Case(lambda: _open(saved), ("pool", "shard-"), right, valid="folder" not in kind)


listed(
    "saved",
    {
        k: k
        for k in (
            *("missing", "torn", "empty", "byte", "folder"),
            *("columns-missing", "columns-torn", "columns-folder"),
        )
    },
    shard,
)


def no_pool(kind: str, random: random.Random, folder: Path) -> Case:
    path = folder / "pool"
    if kind == "file":
        path.write_bytes(b"x")
    elif kind != "missing":
        path.mkdir()
    if kind == "ranks-without-pools":
        (path / "rank-000-of-002").mkdir()
    elif kind == "odd-rank":
        shutil.copytree(_save(folder / "other"), path / "rank-x-of-y")
        (path / "rank-x-of-y" / "manifest.json").write_bytes(b"{}")
    elif kind == "one-rank-of-two":
        shutil.copytree(_save(folder / "other"), path / "rank-000-of-002")
        (path / "rank-001-of-002").mkdir()
        (path / "rank-001-of-002" / "manifest.json").write_bytes(b"{")
    elif kind == "pictures":
        (path / "a.png").write_bytes(b"x")
    right = (ALL, None, []) if kind == "odd-rank" else NEVER  # tars in a folder of any name
    return Case(lambda: _open(path), ("pool", "rank-"), right)


listed(
    "saved",
    {
        k: k
        for k in (
            *("missing", "file", "empty", "ranks-without-pools", "odd-rank", "one-rank-of-two"),
            "pictures",
        )
    },
    no_pool,
)


LINE = '{"event": "evaluation", "source": "dp", "step": 5, "loss": 2.5}\n'


def run(given: tuple[dict[str, bytes], Any], random: random.Random, folder: Path) -> Case:
    """A run's folder as a report reads it: lines that a kill cut short are noted."""
    files, right = given
    odd = right is NEVER or any(not data.isascii() or 0 in data for data in files.values())
    path = folder / "run"
    path.mkdir()
    (path / "recipe.json").write_text(json.dumps(Recipe().to_dict()), encoding="utf-8")
    for name in ("metrics.jsonl", "timings.jsonl"):
        (path / name).write_text(LINE, encoding="utf-8")
    for name, data in files.items():
        (path / name).write_bytes(data)

    def read() -> Any:
        found = read_run(path)
        steps = [row["step"] for row in found.metrics if row["source"] == "dp"]
        return steps, any("line 2" in note and "left out" in note for note in found.notes)

    return Case(read, tuple(files), right, valid=files.keys() <= {"metrics.jsonl"} and not odd)


FIRST = LINE.encode()
listed(
    "saved",
    {
        "plain": ({}, ([5], False)),
        "torn-line": ({"metrics.jsonl": FIRST + FIRST[:30]}, ([5], True)),
        "byte-in-the-last-line": ({"metrics.jsonl": FIRST + b'{"a": "\xc3'}, ([5], True)),
        "nul-bytes-behind": ({"metrics.jsonl": FIRST + bytes(40)}, ([5], True)),
        "line-of-a-list": ({"metrics.jsonl": FIRST + b"[1]\n"}, ([5], True)),
        "line-without-source": ({"metrics.jsonl": FIRST + b'{"step": 6}\n'}, ([5], True)),
        "line-without-step": ({"metrics.jsonl": FIRST + b'{"source": "dp"}\n'}, ([5], True)),
        "utf-16": ({"metrics.jsonl": LINE.encode("utf-16")}, NEVER),
        "recipe-torn": ({"recipe.json": b'{"seed"'}, NEVER),
        "recipe-list": ({"recipe.json": b"[]"}, NEVER),
        "recipe-utf-16": ({"recipe.json": '{"seed": 1}'.encode("utf-16")}, NEVER),
    },
    run,
)


def learner(given: Any, random: random.Random, folder: Path) -> Case:
    """The learner of a run, for guidance."""
    path = folder / "run"
    path.mkdir()
    recipe = Recipe().to_dict()
    options = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "groups_width": 8}
    recipe["learner"] |= {
        "model": "transformers:RegNetForImageClassification",
        "options": options,
    }
    (path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    file = path / "learner_dp.safetensors"
    save_file({"a": torch.zeros(3)}, file)
    data = file.read_bytes()
    if callable(given):
        file.write_bytes(given(data))
    else:
        for name, text in given.items():
            (path / name).write_bytes(text)
    files = tuple(given) if isinstance(given, dict) else ()
    return Case(lambda: load_learner(path, pipeline()), ("learner", "model", *files))


listed(
    "saved",
    {
        "other-weights": lambda data: data,
        "torn": lambda data: data[:-5],
        "torn-head": lambda data: data[:10],
        "empty": lambda data: b"",
        "huge-head": lambda data: b"\xff" * 8 + data[8:],
        "pickle": lambda data: _pickled(),
        "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
        "objects-torn": {"objects.json": b'{"learner": '},
        "objects-list": {"objects.json": b'["learner"]'},
        "objects-utf-16": {"objects.json": "{}".encode("utf-16")},
        "recipe-torn": {"recipe.json": b"{"},
        "recipe-without-model": {"recipe.json": b'{"learner": {"model": "no_such_module:net"}}'},
    },
    learner,
)


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": np.float64(1)}, buffer)
    return buffer.getvalue()


def checkpoints(
    given: tuple[Callable[[Path], object], Any], random: random.Random, folder: Path
) -> Case:
    """Of two checkpoints the second is damaged: the first is used, and a warning says so."""
    damage, right = given
    place = folder / "checkpoints_dp"
    for step in (4, 8):
        made = Checkpoint(
            step=step, iterations=10, ranks=1, components={"trainer": {"w": torch.ones(2), "n": 3}}
        )
        path = checkpoint.save(place, made, keep=2)
    damage(path)

    def read() -> Any:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = checkpoint.latest(place)
        assert found is not None
        said = [w for w in seen if w.category is DamagedCheckpointWarning]
        assert len(said) == len(seen)
        assert all(path.name in str(w.message) or "\n" in str(w.message) for w in said)
        return found.step, len(said)

    return Case(read, ("checkpoint",), right, valid=right is not NEVER and right != (4, 1))


def _record(**values: Any) -> Callable[[Path], object]:
    """Values of the JSON, None: left out."""

    def damage(path: Path) -> None:
        table = json.loads(path.read_bytes()) | values
        kept = {key: value for key, value in table.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return damage


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def damage(path: Path) -> None:
        file = path.with_suffix(name)
        file.write_bytes(change(file.read_bytes()))

    return damage


listed(
    "saved",
    {
        "intact": (lambda path: None, (8, 0)),
        "torn-json": (_bytes(".json", lambda data: data[:50]), (4, 1)),
        "empty-json": (_bytes(".json", lambda data: b""), (4, 1)),
        "list-json": (_bytes(".json", lambda data: b"[]"), (4, 1)),
        "deep-json": (_bytes(".json", lambda data: b"[" * 100_000), (4, 1)),
        "utf-16-json": (_bytes(".json", lambda data: data.decode().encode("utf-16")), (4, 1)),
        "torn-weights": (_bytes(".safetensors", lambda data: data[:-3]), (4, 1)),
        "empty-weights": (_bytes(".safetensors", lambda data: b""), (4, 1)),
        "weights-missing": (lambda path: path.with_suffix(".safetensors").unlink(), (4, 1)),
        "without-step": (_record(step=None), (4, 1)),
        "without-components": (_record(components=None), (4, 1)),
        "components-list": (_record(components=[1]), (4, 1)),
        "components-other": (_record(components={"loader": {}}), (4, 1)),
        "version-text": (_record(version="six"), (4, 1)),
        "version-later": (_record(version=99), NEVER),
        "link-to-nothing": (lambda path: (path.unlink(), path.symlink_to("gone")), (4, 1)),
    },
    checkpoints,
)
