"""Pools in other people's formats, and back: webdataset shards, an image folder, parquet.

    webdataset    shards of ``dpfast.pool.shards``: images as .png, JPEG files as they are, latents
                  as .npy
    imagefolder   train/<class>/<row>.png|.jpg and train/metadata.jsonl, as Hugging Face
                  ``datasets`` reads them
    parquet       train-00000-of-00003.parquet: an image (or a list of fp16 latents) and one field
                  for each column

Every format keeps the payload and all columns exactly, and ``import_pool`` reads each of them; but
an image folder of latents holds the images that they decode to.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.extras import install_command
from dpfast.pool import codecs, shards
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import saved_folders
from dpfast.pool.reader import open_pool
from dpfast.pool.record import COLUMNS, RECORD, as_dict, from_dicts
from dpfast.pool.saver import Saver

FORMATS = ("webdataset", "imagefolder", "parquet")
BATCH = 1000  # samples in memory at a time, and in a row group
FILE_SAMPLES = 50_000  # in one parquet file


def export_pool(pool: SamplePool, out: Path, format: str, classes: list[str] | None = None) -> Path:
    """Writes all samples of ``pool`` into the new or empty folder ``out``.

    classes: names of the labels, for folder names and ``ClassLabel`` features.
    Raises ``InputError`` for a folder in use, an unknown format, and a pool that the format cannot
    hold.
    """
    if format not in FORMATS:
        raise InputError(f"format = {format!r}: expected one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out = {str(out)!r}: exists and is not an empty folder")
    if not len(pool):
        raise InputError("the pool is empty: there is nothing to export")
    pictures = pool.codec == "jpeg" or (
        pool.codec == "pixels" and (pool.shape or (0,))[0] in (1, 3)
    )
    decoded = pool.codec == "latents" and pool.decode is not None
    if format == "imagefolder" and not (pictures or decoded):
        why = (
            "their decoder is that of a run's folder"
            if pool.codec == "latents"
            else "an image has 1 or 3 channels"
        )
        raise InputError(
            f"format = 'imagefolder': the pool holds {pool.codec} of "
            f"shape {pool.shape}, {why}; choose webdataset or parquet"
        )
    if format == "webdataset":
        with Saver(pool, out, images="png" if pictures else "npy", classes=classes) as saver:
            saver.save()
            if saver.wait() < len(pool):
                raise InputError(f"out = {str(out)!r}: {saver.error}")
    elif format == "imagefolder":
        _write_images(pool, out / "train", classes)
    else:
        _write_parquet(pool, out, classes, pictures=pictures)
    return out


def import_pool(
    folder: Path, *, decode: codecs.Decode | None = None
) -> tuple[SamplePool, list[str] | None]:
    """The pool of a run, a saved pool or an exported one, in host memory, and its class names where
    they are known.

    decode: of a saved pool of latents, as of ``SamplePool``. A run's pool is that of its source
    "dp", or of "static" where it alone was run. Raises ``InputError`` when ``folder`` is none of
    these.
    """
    for source in ("pool_dp", "pool_static"):
        if saved_folders(folder / source):
            return import_pool(folder / source, decode=decode)
    try:
        if parts := saved_folders(folder):
            return open_pool(folder, decode=decode), shards.Manifest.read(parts[0]).classes
        if (folder / "train" / "metadata.jsonl").is_file():
            return _read_images(folder / "train")
        if files := sorted(folder.glob("*.parquet")):
            return _read_parquet(files)
        if files := sorted(folder.glob("*.tar")):
            return _read_tars(files), None
    except (ValueError, OSError) as error:
        raise InputError(f"{str(folder)!r} cannot be read: {error}") from error
    raise InputError(
        f"{str(folder)!r} holds neither a run with samples nor a saved or exported pool"
    )


def _rows(
    pool: SamplePool, *, decoded: bool = False
) -> Iterator[tuple[int, np.ndarray, list[Any]]]:
    """(first row, records, payloads) of BATCH samples at a time; payloads are image files, or rows
    of latents.

    decoded: latents as the image files that they decode to.
    """
    for first in range(0, len(pool), BATCH):
        rows = torch.arange(first, min(first + BATCH, len(pool)))
        payload = pool.images(rows) if decoded and pool.codec == "latents" else pool.payload(rows)
        if (
            isinstance(payload, Tensor)
            and payload.dtype == torch.uint8
            and payload.shape[1] in (1, 3)
        ):
            files: list[Any] = [codecs.to_png(pixels) for pixels in payload.numpy()]
        elif isinstance(payload, Tensor):
            files = list(payload.flatten(1).numpy())
        else:
            files = list(payload)
        yield first, pool.records(first, first + len(rows)), files


def _write_images(pool: SamplePool, folder: Path, classes: list[str] | None) -> None:
    suffix = "jpg" if pool.codec == "jpeg" else "png"
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for first, records, files in _rows(pool, decoded=True):
            for row, (record, data) in enumerate(zip(records, files, strict=True), first):
                name = f"{_folder_name(int(record['label']), classes)}/{row:09d}.{suffix}"
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
                lines.write(json.dumps({"file_name": name, **as_dict(record)}) + "\n")
    if classes is not None:
        (folder.parent / "classes.json").write_text(json.dumps(classes) + "\n")


def _folder_name(label: int, classes: list[str] | None) -> str:
    if classes is None or not 0 <= label < len(classes):
        return f"{label:04d}"
    return f"{label:04d}-" + "".join(c if c.isalnum() else "-" for c in classes[label])


def _read_images(folder: Path) -> tuple[SamplePool, list[str] | None]:
    table = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for line, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise InputError(f"{table}, line {line}: it has no file_name")
        shards.check_member(row["file_name"], table)
        if (folder / row["file_name"]).is_symlink():
            raise InputError(f"{folder / row['file_name']} is a link")
    pool = SamplePool("jpeg" if rows and rows[0]["file_name"].endswith(".jpg") else "pixels")
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        files = {row["file_name"]: (folder / row["file_name"]).read_bytes() for row in part}
        if len(files) < len(part):
            raise InputError(f"{table}: a file_name stands in it twice")
        _append_files(pool, files, from_dicts(part))
    names = folder.parent / "classes.json"
    return pool, json.loads(names.read_text()) if names.is_file() else None


def _append_files(pool: SamplePool, files: dict[str, bytes], records: np.ndarray) -> None:
    """Appends image files, decoded where the pool holds pixels. Raises ``InputError`` with the name
    of a bad one.
    """
    if pool.codec == "jpeg":
        for name, data in files.items():
            if not data.startswith(codecs.JPEG_START):
                raise InputError(f"{name} is no JPEG file")
        pool.append_records(list(files.values()), records)
        return
    images: list[np.ndarray] = []
    for name, data in files.items():
        images.append(codecs.from_image_file(data, name))
        expected = pool.shape or images[0].shape
        if images[-1].shape != expected:
            raise InputError(
                f"{name} is of shape {images[-1].shape}, the images before it are {expected}"
            )
    pool.append_records(torch.from_numpy(np.stack(images)), records)


def _read_tars(paths: list[Path]) -> SamplePool:
    """webdataset shards that need not be ours: without .json the sample id is the row and the label
    the .cls.
    """
    pool: SamplePool | None = None
    for path in paths:
        samples = shards.read_tar(path)
        while part := list(itertools.islice(samples, BATCH)):
            rows: list[dict[str, Any]] = []
            for sample in part:
                row = json.loads(sample.read("json")) if "json" in sample.members else {}
                if not isinstance(row, dict):
                    raise InputError(f"{path}: the .json of sample {sample.key!r} is no table")
                label = int(sample.read("cls")) if "cls" in sample.members else 0
                rows.append(
                    {"sample_id": (len(pool) if pool else 0) + len(rows), "label": label} | row
                )
            suffix = next((s for s in shards.SUFFIXES if s in part[0].members), None)
            if suffix is None:
                raise InputError(
                    f"{path}: sample {part[0].key!r} has none of {', '.join(shards.SUFFIXES)}"
                )
            files = {f"{path}: {sample.key}.{suffix}": sample.read(suffix) for sample in part}
            if suffix == "npy":
                data = list(files.values())
                arrays = np.stack(
                    [np.frombuffer(d, np.uint8, offset=shards.npy_data_start(d)) for d in data]
                )
                dtype, shape = shards.npy_kind(data[0])
                pool = pool or SamplePool("pixels" if dtype == np.uint8 else "latents")
                pool.append_records(
                    torch.from_numpy(arrays.view(dtype).reshape(-1, *shape)), from_dicts(rows)
                )
            else:
                pool = pool or SamplePool("pixels" if suffix == "png" else "jpeg")
                _append_files(pool, files, from_dicts(rows))
    if pool is None:
        raise InputError(f"{paths[0]} and all other shards are empty")
    return pool


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"format = 'parquet': needs pyarrow; {install_command('pyarrow')}"
        ) from None
    return pyarrow, pyarrow.parquet


def _write_parquet(
    pool: SamplePool, out: Path, classes: list[str] | None, *, pictures: bool
) -> None:
    arrow, parquet = _arrow()
    out.mkdir(parents=True, exist_ok=True)
    schema = _schema(arrow, pool, classes, pictures=pictures)
    count = -(-len(pool) // FILE_SAMPLES)
    writer = None
    for first, records, payloads in _rows(pool):
        if first % FILE_SAMPLES == 0:
            if writer is not None:
                writer.close()
            name = f"train-{first // FILE_SAMPLES:05d}-of-{count:05d}.parquet"
            writer = parquet.ParquetWriter(out / name, schema)
        if pictures:
            payload = arrow.array(
                [{"bytes": data, "path": None} for data in payloads], schema.field(0).type
            )
        else:
            flat = arrow.array(np.concatenate(payloads))
            payload = arrow.FixedSizeListArray.from_arrays(flat, len(payloads[0]))
        columns = [arrow.array(np.ascontiguousarray(records[name])) for name in COLUMNS]
        assert writer is not None
        writer.write_table(arrow.table([payload, *columns], schema=schema))
    if writer is not None:
        writer.close()


def _schema(arrow: Any, pool: SamplePool, classes: list[str] | None, *, pictures: bool) -> Any:
    """Fields with Hugging Face's feature types, so that an image loads as an image and a label has
    its name.
    """
    if pictures:
        payload = arrow.field(
            "image", arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        )
        features: dict[str, Any] = {"image": {"_type": "Image"}}
    else:
        kind, width = (
            (arrow.uint8(), "uint8") if pool.codec == "pixels" else (arrow.float16(), "float16")
        )
        elements = int(np.prod(pool.shape or ()))
        payload = arrow.field("latent", arrow.list_(kind, elements))
        features = {
            "latent": {
                "feature": {"dtype": width, "_type": "Value"},
                "length": elements,
                "_type": "List",
            }
        }
    fields = [payload]
    for name in COLUMNS:
        dtype = RECORD[name]
        kind = "label" if name == "label" and classes is not None else "value"
        # datasets casts a ClassLabel to int64; the file says so from the start
        fields.append(
            arrow.field(name, arrow.int64() if kind == "label" else arrow.from_numpy_dtype(dtype))
        )
        features[name] = (
            {"names": classes, "_type": "ClassLabel"}
            if kind == "label"
            else {"dtype": str(dtype), "_type": "Value"}
        )
    about = {"codec": pool.codec, "shape": pool.shape, "classes": classes}
    return arrow.schema(
        fields,
        metadata={
            "huggingface": json.dumps({"info": {"features": features}}),
            "dpfast": json.dumps(about),
        },
    )


def _read_parquet(files: list[Path]) -> tuple[SamplePool, list[str] | None]:
    """Our own files, and images as Hugging Face ``datasets`` writes them; missing columns as in
    ``_read_tars``.
    """
    _, parquet = _arrow()
    about: dict[str, Any] | None = None
    pool = SamplePool()
    for path in files:
        with parquet.ParquetFile(path) as file:
            if about is None:
                about = _about(file, path)
                pool = SamplePool(about["codec"])
            for batch in file.iter_batches(BATCH):
                first = len(pool)
                names = batch.schema.names
                table = {name: batch.column(name).to_pylist() for name in COLUMNS if name in names}
                table.setdefault("sample_id", list(range(first, first + batch.num_rows)))
                records = from_dicts(
                    [
                        dict(zip(table, row, strict=True))
                        for row in zip(*table.values(), strict=True)
                    ]
                )
                if "image" in names:
                    data = batch.column("image").field("bytes").to_pylist()
                    images = {
                        f"{path}: the image of row {first + i}": file or b""
                        for i, file in enumerate(data)
                    }
                    _append_files(pool, images, records)
                else:
                    values = batch.column("latent").flatten().to_numpy(zero_copy_only=False)
                    rows = np.array(values).reshape(batch.num_rows, *about["shape"])
                    pool.append_records(torch.from_numpy(rows), records)
    assert about is not None
    return pool, about["classes"]


def _about(file: Any, path: Path) -> dict[str, Any]:
    """codec, shape and class names of a parquet file. Raises ``InputError`` where it holds nothing
    for a pool.
    """
    metadata = file.schema_arrow.metadata or {}
    if b"dpfast" in metadata:
        return dict(json.loads(metadata[b"dpfast"]))
    image = next((field.type for field in file.schema_arrow if field.name == "image"), None)
    if "bytes" not in [field.name for field in image or ()]:
        raise InputError(
            f"{path} was not written by dpfast export, and it has no column 'image' of files"
        )
    first = next(file.iter_batches(1, columns=["image.bytes"]))
    data = first.column("image").field("bytes").to_pylist() if first.num_rows else [None]
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    codec = "jpeg" if (data[0] or b"").startswith(codecs.JPEG_START) else "pixels"
    return {"codec": codec, "shape": None, "classes": features.get("label", {}).get("names")}
