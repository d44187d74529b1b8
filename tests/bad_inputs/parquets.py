"""Parquet files of other people."""

from __future__ import annotations

import datetime
import decimal
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.bad_inputs.case import NEVER, Case, generated, listed
from tests.bad_inputs.files import images, parquet, picture
from tests.bad_inputs.tars import samples_of

NAME = "train-00000-of-00001.parquet"
FILES = [picture(3), picture(9)]


def _class_label(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


def _imported(folder: Path, right: Any, *named: str, valid: bool = False) -> Case:
    named = named or (NAME, "its files are empty")
    return Case(lambda: samples_of(folder), named, right, valid=valid)


@generated(2)
def plain(random: random.Random, folder: Path) -> Case:
    a, b = random.sample(range(9), 2)
    features = {"image": {"_type": "Image"}, "label": _class_label(*"abcdefghi")}
    parquet(folder / NAME, FILES, label=[a, b], features=features)
    return _imported(folder, [(3, a), (9, b)], valid=True)


def values(given: Any, random: random.Random, folder: Path) -> Case:
    """A column ``label`` of two values; with what is right, where something is."""
    right: Any = NEVER
    if isinstance(given, tuple):
        given, labels = given
        right = list(zip((3, 9), labels, strict=True))
    parquet(folder / NAME, FILES, label=given)
    return _imported(folder, right)


listed(
    "parquets",
    {
        "int8": (pyarrow.array([1, 2], pyarrow.int8()), (1, 2)),
        "uint64": (pyarrow.array([1, 2], pyarrow.uint64()), (1, 2)),
        "dictionary": (pyarrow.array([5, 6]).dictionary_encode(), (5, 6)),
        "whole-floats": ([2.0, 3.0], (2, 3)),
        "decimals": (pyarrow.array([decimal.Decimal(1), decimal.Decimal(2)]), (1, 2)),
        "null": pyarrow.array([1, None]),
        "all-null": pyarrow.array([None, None], pyarrow.int64()),
        "of-no-type": pyarrow.nulls(2),
        "fraction": [2.7, 1.0],
        "nan": [1.0, float("nan")],
        "infinity": [1.0, float("inf")],
        "negative": [1, -1],
        "huge": [1, 1 << 40],
        "text": ["cat", "dog"],
        "digits": (["1", "2"], (1, 2)),
        "truth": ([True, False], (1, 0)),
        "lists": [[1], [2]],
        "tables": [{"id": 1}, {"id": 2}],
        "dates": [datetime.date(2024, 1, 1)] * 2,
        "bytes": [b"\1", b"\2"],
    },
    values,
)


def columns(given: Any, random: random.Random, folder: Path) -> Case:
    """Labels that stand in other columns."""
    right: Any = NEVER
    if isinstance(given, tuple):
        given, labels = given
        right = list(zip((3, 9), labels, strict=True))
    parquet(folder / NAME, FILES, **given)
    return _imported(folder, right)


listed(
    "parquets",
    {
        "labels": ({"labels": [1, 2]}, (1, 2)),
        "fine-label": ({"fine_label": [7, 9]}, (7, 9)),
        "fine-and-coarse": {"fine_label": [7, 9], "coarse_label": [1, 2]},
        "one-class-label": (
            {"target": [1, 0], "age": [31, 44], "features": {"target": _class_label("a", "b")}},
            (1, 0),
        ),
        "two-class-labels": {
            "kind": [1, 0],
            "sort": [0, 1],
            "features": {"kind": _class_label("a", "b"), "sort": _class_label("a", "b")},
        },
        "none": {},
        "text": {"text": ["a dog", "a cat"]},
        "capital": ({"Label": [1, 2]}, (1, 2)),
        "with-a-name-too-few": {"label": [0, 5], "features": {"label": _class_label("a", "b")}},
        "names-that-are-none": ({"label": [0, 1], "features": {"label": {"names": "ab"}}}, (0, 1)),
        "names-of-numbers": (
            {"label": [0, 1], "features": {"label": {"names": [1, 2], "_type": "ClassLabel"}}},
            (0, 1),
        ),
        "features-that-are-a-list": ({"label": [0, 1], "features": [1]}, (0, 1)),
        "ids-of-text": ({"label": [1, 2], "sample_id": ["a", "b"]}, (1, 2)),
        "ids-null": ({"label": [1, 2], "sample_id": pyarrow.array([0, None])}, (1, 2)),
        "rounds-of-halves": ({"label": [1, 2], "round": [0.5, 1.5]}, (1, 2)),
    },
    columns,
)


@generated(1)
def features_that_are_no_json(random: random.Random, folder: Path) -> Case:
    parquet(folder / NAME, FILES, label=[1, 2], metadata={"huggingface": "{"})
    return _imported(folder, [(3, 1), (9, 2)])


def about(text: str, random: random.Random, folder: Path) -> Case:
    """What ``dpfast export`` says of a file, damaged."""
    parquet(folder / NAME, FILES, label=[1, 2], metadata={"dpfast": text})
    return _imported(folder, [(3, 1), (9, 2)] if "codec" in text and "ab" not in text else NEVER)


listed(
    "parquets",
    {
        "torn": "{",
        "list": "[1]",
        "empty": "{}",
        "other-codec": json.dumps({"codec": "wavelets", "shape": [1, 8, 8], "classes": None}),
        "no-shape": json.dumps({"codec": "pixels"}),
        "classes-text": json.dumps({"codec": "pixels", "shape": [1, 8, 8], "classes": "ab"}),
        "latents-of-pictures": json.dumps(
            {"codec": "latents", "shape": [1, 8, 8], "classes": None}
        ),
    },
    about,
)


def pictures(files: Any, random: random.Random, folder: Path) -> Case:
    table = pyarrow.table({"image": files, "label": [1, 2]})
    pyarrow.parquet.write_table(table, folder / NAME)
    return _imported(folder, NEVER)


listed(
    "parquets",
    {
        "path-alone": pyarrow.array(
            [{"bytes": None, "path": "a.png"}] * 2,
            pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
        ),
        "null": images([FILES[0], None]),
        "null-structs": pyarrow.nulls(2, images(FILES).type),
        "empty": images([b"", FILES[1]]),
        "text": pyarrow.array(["a.png", "b.png"]),
        "numbers": pyarrow.array([1, 2]),
        "lists-of-numbers": pyarrow.array([[1, 2], [3, 4]]),
        "bytes-as-text": pyarrow.array([{"bytes": "x", "path": None}] * 2),
        "struct-of-paths": pyarrow.array([{"path": "a.png"}] * 2),
        "rubbish": images([FILES[0], b"no picture"]),
        "other-size": images([FILES[0], picture(9, side=9)]),
    },
    pictures,
)


@generated(1)
def pictures_that_are_bytes_alone(random: random.Random, folder: Path) -> Case:
    table = pyarrow.table({"image": pyarrow.array(FILES), "label": [1, 2]})
    pyarrow.parquet.write_table(table, folder / NAME)
    return _imported(folder, [(3, 1), (9, 2)])


@generated(1)
def pictures_under_another_name(random: random.Random, folder: Path) -> Case:
    table = pyarrow.table({"img": images(FILES), "label": [1, 2]})
    pyarrow.parquet.write_table(table, folder / NAME)
    return _imported(folder, [(3, 1), (9, 2)])


@generated(1)
def no_rows(random: random.Random, folder: Path) -> Case:
    parquet(folder / NAME, [], label=pyarrow.array([], pyarrow.int64()))
    return _imported(folder, NEVER)


def damaged(kind: str, random: random.Random, folder: Path) -> Case:
    parquet(folder / NAME, FILES, label=[1, 2])
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(
        {
            "torn": data[: random.randrange(5, len(data) - 1)],
            "empty": b"",
            "text": b"image,label\n",
            "magic": b"PAR1" + bytes(40) + b"PAR1",
            "pointer": b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
            "pages": data[:20] + bytes(60) + data[80:],
        }[kind]
    )
    return _imported(folder, NEVER)


listed(
    "parquets",
    {k: k for k in ("torn", "empty", "text", "magic", "pointer", "pages")},
    damaged,
)


@generated(2)
def train_and_test_in_one_folder(random: random.Random, folder: Path) -> Case:
    parquet(folder / NAME, FILES, label=[1, 2])
    other = random.choice(["test", "validation"])
    parquet(folder / f"{other}-00000-of-00001.parquet", FILES, label=[1, 2])
    return _imported(folder, NEVER, other, "split")


@generated(2)
def several_files(random: random.Random, folder: Path) -> Case:
    a, b = random.sample(range(9), 2)
    parquet(folder / "train-00000-of-00002.parquet", FILES[:1], label=[a])
    parquet(folder / "train-00001-of-00002.parquet", FILES[1:], label=[b])
    return _imported(folder, [(3, a), (9, b)], valid=True)


def of_which_the_second(given: Any, random: random.Random, folder: Path) -> Case:
    """Files of one set that do not agree."""
    names = _class_label("a", "b")
    parquet(folder / "train-00000-of-00002.parquet", FILES, label=[1, 0], features={"label": names})
    second = "train-00001-of-00002.parquet"
    parquet(folder / second, FILES, **given)
    return _imported(folder, NEVER, second)


listed(
    "parquets",
    {
        "lacks-labels": {},
        "has-fractions": {"label": [0.5, 1.0]},
        "has-other-names": {"label": [1, 0], "features": {"label": _class_label("b", "a")}},
        "has-more-classes": {"label": [1, 2], "features": {"label": _class_label("a", "b", "c")}},
    },
    of_which_the_second,
)


@generated(2)
def hidden_files(random: random.Random, folder: Path) -> Case:
    parquet(folder / NAME, FILES, label=[1, 2])
    (folder / f"._{NAME}").write_bytes(random.randbytes(100))
    (folder / f".{NAME}").write_bytes(b"torn")
    return _imported(folder, [(3, 1), (9, 2)], valid=True)


@generated(1)
def a_folder_called_like_a_file(random: random.Random, folder: Path) -> Case:
    (folder / NAME).mkdir()
    parquet(folder / NAME / "part-0.parquet", FILES, label=[1, 2])
    return _imported(folder, [(3, 1), (9, 2)], NAME, folder.name)
