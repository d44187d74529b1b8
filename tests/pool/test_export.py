"""Exports: exact there and back, and readable by the libraries that they are for."""

import errno
import io
import json
import os
import tarfile
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from dpfast.cli.main import main
from dpfast.errors import InputError
from dpfast.pool import codecs
from dpfast.pool.export import FORMATS, export_pool
from dpfast.pool.importing import import_pool
from dpfast.pool.pool import SamplePool
from dpfast.pool.record import COLUMNS
from dpfast.pool.saver import Saver
from tests.pool.helpers import ORIGIN, batch, latents, pixels

CLASSES = ["cat", "red bicycle", "a/b", *"defghij"]
COUNT = 30


def pool_of(codec):
    pool = SamplePool(codec)
    for number in range(3):
        ids = torch.arange(len(pool), len(pool) + 10)
        payload = latents(ids) if codec == "latents" else None
        pool.append(batch(len(pool), 10), payload=payload, round=number, **ORIGIN)
    return pool


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Hugging Face ``datasets`` with its cache in a folder of the test and no way to a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    return pytest.importorskip("datasets")


@pytest.mark.parametrize("codec", ["pixels", "jpeg", "latents"])
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_is_exact(codec, format, tmp_path):
    pool = pool_of(codec)
    if (codec, format) == ("latents", "imagefolder"):
        with pytest.raises(InputError, match="choose webdataset or parquet"):
            export_pool(pool, tmp_path / "out", format)
        return
    written, read = [], []
    export_pool(pool, tmp_path / "out", format, CLASSES, done=written.append)
    again, classes = import_pool(tmp_path / "out", done=read.append)
    assert sum(written) == COUNT
    assert sum(read) == (0 if format == "webdataset" else COUNT)  # shards are opened where they are
    assert (again.codec, classes) == (codec, CLASSES)
    assert again.records().tobytes() == pool.records().tobytes()
    everything = torch.arange(COUNT)
    before, after = pool.payload(everything), again.payload(everything)
    assert before == after if codec == "jpeg" else torch.equal(before, after)


def columns_match(rows):
    """Rows of a foreign library against the columns that the samples were born with."""
    assert [row["sample_id"] for row in rows] == list(range(COUNT))
    assert [row["label"] for row in rows] == [i % 10 for i in range(COUNT)]
    assert [row["round"] for row in rows] == [i // 10 for i in range(COUNT)]
    expected = batch(0, COUNT).entropy.numpy()
    np.testing.assert_array_equal(np.float32([row["entropy"] for row in rows]), expected)


def image_matches(image, row):
    assert np.array_equal(
        np.asarray(image).transpose(2, 0, 1), pixels(torch.tensor([row]))[0].numpy()
    )


def test_datasets_reads_the_webdataset_export(datasets, tmp_path):
    export_pool(pool_of("pixels"), tmp_path / "out", "webdataset")
    rows = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "out" / "*.tar"), split="train"
    )
    columns_match(rows["json"])
    image_matches(rows[21]["png"], 21)
    assert rows[21]["cls"] == 1


def test_datasets_reads_the_image_folder(datasets, tmp_path):
    export_pool(pool_of("pixels"), tmp_path / "out", "imagefolder", CLASSES)
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train")
    columns_match(sorted(rows, key=lambda row: row["sample_id"]))
    image_matches(next(row["image"] for row in rows if row["sample_id"] == 13), 13)
    assert (tmp_path / "out" / "train" / "0002-a-b").is_dir()  # a class name is no path


def test_datasets_reads_the_parquet_export(datasets, tmp_path):
    export_pool(pool_of("pixels"), tmp_path / "images", "parquet", CLASSES)
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "images" / "*.parquet"), split="train"
    )
    columns_match(rows)
    image_matches(rows[29]["image"], 29)
    assert rows.features["label"].names == CLASSES
    export_pool(pool_of("latents"), tmp_path / "latents", "parquet")
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "latents" / "*.parquet"), split="train"
    )
    columns_match(rows)
    assert np.array_equal(
        np.float16(rows[3]["latent"]), latents(torch.tensor([3])).flatten().numpy()
    )


def test_what_datasets_writes_is_imported(datasets, tmp_path):
    """An export that was filtered there and written again, which loses our metadata, and one of
    their own columns.
    """
    for codec in ("pixels", "jpeg"):
        pool = pool_of(codec)
        export_pool(pool, tmp_path / codec, "parquet", CLASSES)
        rows = datasets.load_dataset(
            "parquet", data_files=str(tmp_path / codec / "*.parquet"), split="train"
        )
        (tmp_path / f"{codec} again").mkdir()
        rows.filter(lambda row: row["label"] < 3).to_parquet(
            tmp_path / f"{codec} again" / "a.parquet"
        )
        again, classes = import_pool(tmp_path / f"{codec} again")
        kept = torch.nonzero(pool.column("label") < 3).flatten()
        assert (again.codec, classes) == (codec, CLASSES)
        for name in COLUMNS:
            assert torch.equal(
                again.column(name).nan_to_num(-1), pool.column(name)[kept].nan_to_num(-1)
            ), name
        before, after = pool.payload(kept), again.payload(torch.arange(len(kept)))
        assert before == after if codec == "jpeg" else torch.equal(before, after)
    pictures = [
        Image.fromarray(pixels(torch.tensor([i]))[0].permute(1, 2, 0).numpy()) for i in range(4)
    ]
    plain = datasets.Dataset.from_dict({"image": pictures, "label": [3, 1, 2, 0]})
    (tmp_path / "plain").mkdir()
    plain.to_parquet(tmp_path / "plain" / "a.parquet")
    foreign, _ = import_pool(tmp_path / "plain")
    assert foreign.column("label").tolist() == [3, 1, 2, 0]
    assert foreign.column("sample_id").tolist() == [0, 1, 2, 3]
    assert torch.equal(foreign.images(torch.arange(4)), pixels(torch.arange(4)))


@pytest.mark.parametrize("codec", ["jpeg", "latents"])
def test_webdataset_reads_the_exports_of_other_payloads(codec, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pool = pool_of(codec)
    export_pool(pool, tmp_path / "out", "webdataset")
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    suffix = "jpg" if codec == "jpeg" else "npy"
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).to_tuple(suffix, "cls", "json"))
    assert [int(label) for _, label, _ in samples] == pool.column("label").tolist()
    assert [json.loads(columns)["sample_id"] for *_, columns in samples] == list(range(COUNT))
    files = [data for data, *_ in samples]
    if codec == "jpeg":
        assert files == pool.payload(torch.arange(COUNT))
    else:
        arrays = np.stack([np.load(io.BytesIO(data)) for data in files])
        assert np.array_equal(arrays, pool.payload(torch.arange(COUNT)).numpy())


def damage(folder, format, how):
    """One file of an export made unusable; a part of the message that names it."""
    path = sorted(
        folder.rglob(
            {"webdataset": "*.tar", "imagefolder": "*.png", "parquet": "*.parquet"}[format]
        )
    )[0]
    if how == "missing":
        path.unlink()
    elif how == "torn":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"no such file" * 100)
    return path.name


@pytest.mark.parametrize(
    ("format", "how"),
    [
        (f, h)
        for f in FORMATS
        for h in ("missing", "torn", "other")
        if f == "imagefolder" or h != "missing"
    ],
)
def test_a_damaged_export_is_one_error_that_names_the_file(format, how, tmp_path, capsys):
    export_pool(pool_of("pixels"), tmp_path / "out", format)
    # as a foreign shard, without checksums
    (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)
    name = damage(tmp_path / "out", format, how)
    assert (
        main(
            [
                "export",
                str(tmp_path / "out"),
                "--format",
                "parquet",
                "--out",
                str(tmp_path / "again"),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (name if format != "parquet" else str(tmp_path / "out")) in error


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"a.png": b"no image", "a.cls": b"1"}, r"a\.png: cannot be read as an image"),
        ({"a.jpg": b"no image", "a.cls": b"1"}, r"a\.jpg: cannot be read as an image"),
        ({"a.cls": b"3"}, "'a' has none of npy, png, jpg"),
        (
            {
                "a.png": codecs.to_png(pixels(torch.tensor([1]))[0].numpy()),
                "a.cls": b"2",
                "b.cls": b"1",
            },
            "'b' has none of npy, png",
        ),
        ({"a.png": b"", "a.cls": b"dog"}, "dog"),
        ({"a.png": b"", "a.json": b"[1]"}, "'a' is no table"),
        ({"a.png": b"", "a.json": b"{"}, "Expecting property name"),
        ({"a.png": b"", "a.json": b'{"label": "dog"}'}, r"'a', \.json: the label is 'dog'"),
        ({"a.npy": b"no array", "a.cls": b"1"}, r"a\.npy: the magic string"),
        ({}, "empty"),
    ],
)
def test_foreign_shards_that_hold_something_else_are_named(members, named, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(InputError, match=named):
        import_pool(tmp_path)


def test_images_of_two_shapes_are_named(tmp_path):
    export_pool(pool_of("pixels"), tmp_path / "out", "imagefolder")
    path = tmp_path / "out" / "train" / "0001" / "000000011.png"
    path.write_bytes(codecs.to_png(pixels(torch.tensor([1]), (3, 5, 5))[0].numpy()))
    with pytest.raises(
        InputError, match=r"0001/000000011\.png is of shape \(3, 5, 5\).*\(3, 6, 6\)"
    ):
        import_pool(tmp_path / "out")


def test_the_command_exports_a_run_and_an_export(tmp_path, capsys):
    pool = pool_of("pixels")
    with Saver(pool, tmp_path / "run" / "pool_dp", classes=CLASSES) as saver:
        saver.save()
    previous = tmp_path / "run"
    for format in ("parquet", "imagefolder", "webdataset"):
        assert (
            main(["export", str(previous), "--format", format, "--out", str(tmp_path / format)])
            == 0
        )
        assert "30 samples" in capsys.readouterr().out
        previous = tmp_path / format
    again, classes = import_pool(previous)
    assert again.records().tobytes() == pool.records().tobytes()
    assert torch.equal(again.images(torch.arange(COUNT)), pool.images(torch.arange(COUNT)))
    assert classes == CLASSES


def test_foreign_webdataset_shards_are_imported(tmp_path):
    """Written by the webdataset library itself, without our columns."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for i in range(5):
            image = pixels(torch.tensor([i]))[0].permute(1, 2, 0).numpy()
            sink.write({"__key__": f"sub/sample{i}", "png": image, "cls": i + 3})
    pool, _ = import_pool(tmp_path)
    assert pool.column("label").tolist() == [3, 4, 5, 6, 7]
    assert pool.column("sample_id").tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(pool.images(torch.arange(5)), pixels(torch.arange(5)))


def test_bad_input_is_named_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        export_pool(pool_of("pixels"), tmp_path / "full", "parquet")
    with pytest.raises(InputError, match="nothing to export"):
        export_pool(SamplePool(), tmp_path / "out", "parquet")
    with pytest.raises(InputError, match="the pool: label 9, expected 0 to 8"):
        export_pool(pool_of("pixels"), tmp_path / "out", "parquet", CLASSES[:9])
    with pytest.raises(InputError, match="format = 'zip'"):
        export_pool(pool_of("pixels"), tmp_path / "out", "zip")
    assert not (tmp_path / "out").exists()
    assert (
        main(
            [
                "export",
                str(tmp_path / "full"),
                "--format",
                "parquet",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "neither a run with samples nor" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text(
        json.dumps({"file_name": "../../secret.png"}) + "\n"
    )
    with pytest.raises(InputError, match=r"'\.\./\.\./secret\.png'"):
        import_pool(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_refuses_an_export_is_one_error(format, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    export = import_module("dpfast.pool.export")
    for name in ("_rows", "Saver"):
        monkeypatch.setattr(export, name, full)
    with pytest.raises(InputError, match=r"out = .*No space left on device"):
        export_pool(pool_of("pixels"), tmp_path / "out", format)
