"""Exports: exact there and back, and readable by the libraries that they are for."""

import json
import os

import numpy as np
import pytest
import torch

from dpfast.cli.main import main
from dpfast.config import RecipeError
from dpfast.pool.export import FORMATS, export_pool, import_pool
from dpfast.pool.pool import SamplePool
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
        with pytest.raises(RecipeError, match="choose webdataset or parquet"):
            export_pool(pool, tmp_path / "out", format)
        return
    export_pool(pool, tmp_path / "out", format, CLASSES)
    again, classes = import_pool(tmp_path / "out")
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
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), pixels(torch.tensor([row]))[0].numpy())


def test_datasets_reads_the_webdataset_export(datasets, tmp_path):
    export_pool(pool_of("pixels"), tmp_path / "out", "webdataset")
    rows = datasets.load_dataset("webdataset", data_files=str(tmp_path / "out" / "*.tar"), split="train")
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
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "images" / "*.parquet"), split="train")
    columns_match(rows)
    image_matches(rows[29]["image"], 29)
    assert rows.features["label"].names == CLASSES
    export_pool(pool_of("latents"), tmp_path / "latents", "parquet")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "latents" / "*.parquet"), split="train")
    columns_match(rows)
    assert np.array_equal(np.float16(rows[3]["latent"]), latents(torch.tensor([3])).flatten().numpy())


def test_the_command_exports_a_run_and_an_export(tmp_path, capsys):
    pool = pool_of("pixels")
    with Saver(pool, tmp_path / "run" / "pool_dp", classes=CLASSES) as saver:
        saver.save()
    previous = tmp_path / "run"
    for format in ("parquet", "imagefolder", "webdataset"):
        assert main(["export", str(previous), "--format", format, "--out", str(tmp_path / format)]) == 0
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
    with pytest.raises(RecipeError, match="not an empty folder"):
        export_pool(pool_of("pixels"), tmp_path / "full", "parquet")
    with pytest.raises(RecipeError, match="nothing to export"):
        export_pool(SamplePool(), tmp_path / "out", "parquet")
    with pytest.raises(RecipeError, match="format = 'zip'"):
        export_pool(pool_of("pixels"), tmp_path / "out", "zip")
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "full"), "--format", "parquet", "--out", str(tmp_path / "out")]) == 2
    assert "neither a run with samples nor" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps({"file_name": "../../secret.png"}) + "\n")
    with pytest.raises(RecipeError, match=r"'\.\./\.\./secret\.png'"):
        import_pool(tmp_path)
