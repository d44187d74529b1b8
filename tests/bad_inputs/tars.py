"""Tars that are not what ``dpfast export`` writes, or not any more."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpfast.pool.importing import import_pool
from tests.bad_inputs.case import NEVER, Case, generated, listed
from tests.bad_inputs.files import picture, tar_of

Member = tuple[str, bytes] | tarfile.TarInfo


def samples_of(folder: Path) -> list[tuple[int, int]]:
    """(level of the picture, label) of every sample of a pool."""
    pool, _ = import_pool(folder)
    levels = pool.images(torch.arange(len(pool)))[:, 0, 0, 0] if len(pool) else torch.empty(0)
    return list(zip(levels.tolist(), pool.column("label").tolist(), strict=True))


def _imported(folder: Path, data: bytes, right: Any, *, valid: bool = False) -> Case:
    (folder / "a.tar").write_bytes(data)
    named = ("a.tar", "its files are empty")
    return Case(lambda: samples_of(folder), named, right, valid=valid)


def _samples(random: random.Random, count: int, first: int = 0) -> tuple[list[Member], list[Any]]:
    """Members of so many samples, and what they are."""
    members: list[Member] = []
    right = []
    for i in range(first, first + count):
        level, label = random.randrange(256), random.randrange(1, 9)
        members += [(f"{i:03d}.png", picture(level)), (f"{i:03d}.cls", b"%d" % label)]
        right.append((level, label))
    return members, right


@generated(3)
def plain(random: random.Random, folder: Path) -> Case:
    members, right = _samples(random, random.randrange(1, 6))
    return _imported(folder, tar_of(*members), right, valid=True)


@generated(2)
def in_folders(random: random.Random, folder: Path) -> Case:
    members, right = _samples(random, 3)
    top = tarfile.TarInfo("./train")
    top.type = tarfile.DIRTYPE
    moved = [(f"./train/{name}", data) for name, data in members]
    return _imported(folder, tar_of(top, *moved), right, valid=True)


@generated(2)
def long_names(random: random.Random, folder: Path) -> Case:
    members, right = _samples(random, 2)
    long = [("x" * 150 + name, data) for name, data in members]
    format = random.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    return _imported(folder, tar_of(*long, format=format), right)


@generated(4)
def torn(random: random.Random, folder: Path) -> Case:
    members, _ = _samples(random, 4)
    data = tar_of(*members)
    end = data.rindex(b"ustar") + 512  # the rest is padding
    return _imported(folder, data[: random.randrange(1, end)], NEVER)


@generated(2)
def torn_between_two_members(random: random.Random, folder: Path) -> Case:
    members, _ = _samples(random, 4)
    return _imported(folder, tar_of(*members)[: 1024 * random.randrange(1, 6)], NEVER)


@generated(3)
def two_behind_each_other(random: random.Random, folder: Path) -> Case:
    (one, right), (other, more) = _samples(random, 2), _samples(random, 2, first=2)
    return _imported(folder, tar_of(*one) + tar_of(*other), right + more)


@generated(2)
def something_behind_the_end(random: random.Random, folder: Path) -> Case:
    members, right = _samples(random, 2)
    return _imported(folder, tar_of(*members) + random.randbytes(700), right)


@generated(3)
def a_header_with_a_wrong_byte(random: random.Random, folder: Path) -> Case:
    members, _ = _samples(random, 4)
    data = bytearray(tar_of(*members))
    place = 512 * random.choice([0, 2, 4, 6])  # a picture, its header, a label, its header
    assert data[place + 257 : place + 262] == b"ustar"
    data[place + random.choice([3, 130, 150])] ^= 5
    return _imported(folder, bytes(data), NEVER)


@generated(3)
def a_key_that_comes_twice(random: random.Random, folder: Path) -> Case:
    members, _ = _samples(random, 3)
    again = random.randrange(3)
    twice = [*members, *members[2 * again : 2 * again + 2]]
    return _imported(folder, tar_of(*twice), NEVER)


@generated(2)
def members_of_a_sample_apart(random: random.Random, folder: Path) -> Case:
    """All pictures, then all labels, as ``tar --sort=none`` of a folder may have them."""
    members, right = _samples(random, 3)
    return _imported(folder, tar_of(*members[::2], *members[1::2]), right)


@generated(3)
def a_sample_without_a_label(random: random.Random, folder: Path) -> Case:
    members, _ = _samples(random, 3)
    del members[2 * random.randrange(3) + 1]
    return _imported(folder, tar_of(*members), NEVER)


@generated(3)
def a_sample_without_a_picture(random: random.Random, folder: Path) -> Case:
    members, _ = _samples(random, 3)
    del members[2 * random.randrange(3)]
    return _imported(folder, tar_of(*members), NEVER)


@generated(2)
def a_sample_in_another_format(random: random.Random, folder: Path) -> Case:
    members, right = _samples(random, 3)
    name, data = members[4]
    members[4] = (name.replace(".png", ".jpg"), data)
    return _imported(folder, tar_of(*members), right)


@generated(1)
def two_pictures_in_a_sample(random: random.Random, folder: Path) -> Case:
    members = [("0.png", picture(7)), ("0.jpg", picture(9)), ("0.cls", b"1")]
    return _imported(folder, tar_of(*members), NEVER)


@generated(2)
def rubbish_of_a_mac(random: random.Random, folder: Path) -> Case:
    """Resource forks and folders' settings are hidden files, and no data."""
    members, right = _samples(random, 2)
    forks = [(f"._{name}", random.randbytes(163)) for name, _ in members]
    mixed = [each for pair in zip(forks, members, strict=True) for each in pair]
    return _imported(folder, tar_of((".DS_Store", b"\0\0\0\1Bud1"), *mixed), right, valid=True)


@generated(1)
def capital_suffixes(random: random.Random, folder: Path) -> Case:
    members, right = _samples(random, 2)
    shouted = [(name.upper(), data) for name, data in members]
    return _imported(folder, tar_of(*shouted), right)


def label(text: bytes | tuple[bytes, int], random: random.Random, folder: Path) -> Case:
    right: Any = NEVER
    if isinstance(text, tuple):
        text, number = text
        right = [(3, 1), (9, number)]
    members = [("0.png", picture(3)), ("0.cls", b"1"), ("1.png", picture(9)), ("1.cls", text)]
    return _imported(folder, tar_of(*members), right)


listed(
    "tars",
    {
        "blank": (b" 7\r\n", 7),
        "zeros": (b"0007", 7),
        "whole-float": (b"7.0", 7),
        "arabic": ("٣".encode(), 3),
        "mark": ("\ufeff7".encode(), 7),
        "name": b"dog",
        "empty": b"",
        "fraction": b"2.7",
        "negative": b"-1",
        "huge": b"99999999999",
        "endless": b"9" * 5000,
        "nan": b"nan",
        "two": b"1 2",
        "underscore": b"1_0",
        "bytes": b"\xff\xfe\x01",
        "null": b"null",
    },
    label,
)


def json_member(text: str | tuple[str, int], random: random.Random, folder: Path) -> Case:
    right: Any = NEVER
    if isinstance(text, tuple):
        text, number = text
        right = [(3, 1), (9, number)]
    data = text.encode("utf-8", "surrogatepass")
    members = [("0.png", picture(3)), ("0.json", b'{"label": 1}')]
    members += [("1.png", picture(9)), ("1.json", data)]
    return _imported(folder, tar_of(*members), right)


listed(
    "tars",
    {
        "caption": ('{"label": 5, "caption": "a\u2028b"}', 5),
        "float": ('{"label": 5.0}', 5),
        "null": '{"label": null}',
        "text": '{"label": "dog"}',
        "fraction": '{"label": 2.7}',
        "list": '{"label": [5]}',
        "nan": '{"label": NaN}',
        "infinity": '{"label": 1e999}',
        "true": ('{"label": true}', 1),
        "negative": '{"label": -3}',
        "huge": '{"label": 4294967296}',
        "absent": '{"caption": "a dog"}',
        "other-name": '{"labels": 3}',
        "no-table": "[1, 2]",
        "torn": '{"label": 3',
        "empty": "",
        "deep": "[" * 100_000,
        "huge-id": ('{"label": 1, "sample_id": 1e300}', 1),
        "text-id": ('{"label": 1, "sample_id": "img_001"}', 1),
        "step-fraction": ('{"label": 1, "learner_step": 1.5}', 1),
        "omega-text": ('{"label": 1, "omega": "strong"}', 1),
    },
    json_member,
)


@generated(2)
def label_and_json_disagree(random: random.Random, folder: Path) -> Case:
    members = [("0.png", picture(3)), ("0.cls", b"5"), ("0.json", b'{"label": 3}')]
    return _imported(folder, tar_of(*members), NEVER)


@generated(1)
def label_and_null_in_json(random: random.Random, folder: Path) -> Case:
    members = [("0.png", picture(3)), ("0.cls", b"5"), ("0.json", b'{"label": null}')]
    return _imported(folder, tar_of(*members), [(3, 5)])


@generated(1)
def label_and_a_caption_in_json(random: random.Random, folder: Path) -> Case:
    members = [("0.png", picture(3)), ("0.cls", b"5"), ("0.json", b'{"caption": "a dog"}')]
    return _imported(folder, tar_of(*members), [(3, 5)], valid=True)


def label_under(suffix: str, random: random.Random, folder: Path) -> Case:
    """Of what else there is, only what is unambiguous may be taken."""
    text = b"dog" if suffix in ("txt", "caption") else b"3"
    return _imported(folder, tar_of(("0.png", picture(9)), (f"0.{suffix}", text)), NEVER)


listed("tars", {s: s for s in ("txt", "label", "caption", "index", "class")}, label_under)


def member(kind: str, random: random.Random, folder: Path) -> Case:
    info = tarfile.TarInfo("1.png")
    info.type = {
        "link": tarfile.SYMTYPE,
        "hard-link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
        "sparse": tarfile.GNUTYPE_SPARSE,
    }[kind]
    if kind.endswith("link"):
        info.linkname = random.choice(["0.png", "/etc/passwd", "../0.png"])
    members: list[Member] = [("0.png", picture(3)), ("0.cls", b"1"), info, ("1.cls", b"2")]
    return _imported(folder, tar_of(*members, format=tarfile.GNU_FORMAT), NEVER)


listed("tars", {k: k for k in ("link", "hard-link", "device", "fifo", "sparse")}, member)


def name_of_a_member(name: str, random: random.Random, folder: Path) -> Case:
    members = [("0.png", picture(3)), ("0.cls", b"1"), (name + ".png", picture(9))]
    data = tar_of(*members, (name + ".cls", b"2"), format=tarfile.PAX_FORMAT)
    return _imported(folder, data, NEVER)


listed(
    "tars",
    {"absolute": "/etc/x", "up": "../x", "inside": "a/../../x", "back": "a\\..\\x"},
    name_of_a_member,
)


def another_file(make: Any, random: random.Random, folder: Path) -> Case:
    members, right = _samples(random, 2)
    whole = tar_of(*members)
    data = make(whole)
    may = make in (gzip.compress, bz2.compress, lzma.compress) or whole in data
    return _imported(folder, data, right if may and make is not _zip else NEVER)


def _zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        out.writestr("0.png", data)
    return buffer.getvalue()


listed(
    "tars",
    {
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "xz": lzma.compress,
        "zip": _zip,
        "empty": lambda data: b"",
        "end-mark": lambda data: bytes(10240),
        "zero-blocks-first": lambda data: bytes(512) + data,
        "text": lambda data: b"this is no tar\n" * 100,
        "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
    },
    another_file,
)


def _npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def array(make: Any, random: random.Random, folder: Path) -> Case:
    good = np.full((3, 4, 4), 8, np.uint8)
    members = [("0.npy", _npy(good)), ("0.cls", b"1"), ("1.npy", make(good)), ("1.cls", b"2")]
    return _imported(folder, tar_of(*members), NEVER)


listed(
    "tars",
    {
        "float32": lambda a: _npy(a.astype(np.float32)),
        "float16-among-uint8": lambda a: _npy(a.astype(np.float16)),
        "fortran": lambda a: _npy(
            np.asfortranarray(np.arange(48, dtype=np.uint8).reshape(3, 4, 4))
        ),
        "flat": lambda a: _npy(a.reshape(-1)),
        "other-shape": lambda a: _npy(a[:, :2]),
        "turned-shape": lambda a: _npy(a.reshape(4, 3, 4)),
        "pickle": lambda a: _npy(np.array([{}], object)),
        "torn": lambda a: _npy(a)[:-5],
        "torn-head": lambda a: _npy(a)[:40],
        "longer": lambda a: _npy(a) + bytes(16),
        "png": lambda a: picture(3),
        "empty": lambda a: b"",
    },
    array,
)


@generated(2)
def two_tars_of_which_one(random: random.Random, folder: Path) -> Case:
    members, _ = _samples(random, 2)
    (folder / "a.tar").write_bytes(tar_of(*members))
    (folder / "b.tar").write_bytes(random.choice([b"", tar_of(("1.txt", b"x"))]))
    return Case(lambda: samples_of(folder), ("b.tar",))


@generated(2)
def hidden_tars(random: random.Random, folder: Path) -> Case:
    """A resource fork, and what an interrupted download left."""
    (folder / "._a.tar").write_bytes(random.randbytes(300))
    (folder / ".b.tar").write_bytes(b"torn")
    members, right = _samples(random, 2)
    return _imported(folder, tar_of(*members), right, valid=True)


@generated(1)
def samples_in_order_of_their_ids(random: random.Random, folder: Path) -> Case:
    """Ids that come twice would be one sample's noise for two."""
    rows = [{"label": 1, "sample_id": 4}, {"label": 2, "sample_id": 4}]
    members: list[Member] = []
    for i, row in enumerate(rows):
        members += [(f"{i}.png", picture(i)), (f"{i}.json", json.dumps(row).encode())]
    return _imported(folder, tar_of(*members), [(0, 1), (1, 2)])
