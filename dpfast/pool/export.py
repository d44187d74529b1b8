"""Pools in other people's formats: webdataset shards, an image folder, parquet.

    webdataset    shards of ``dpfast.pool.shards``: images as .png, JPEG files as they are, latents
                  as .npy
    imagefolder   train/<class>/<row>.png|.jpg and train/metadata.jsonl, as Hugging Face
                  ``datasets`` reads them
    parquet       train-00000-of-00003.parquet: an image (or a list of fp16 latents) and one field
                  for each column

Every format keeps the payload and all columns exactly, and ``dpfast.pool.importing`` reads each of
them; but an image folder of latents holds the images that they decode to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpfast.data.class_folders import folder_name
from dpfast.errors import InputError
from dpfast.labels import class_ids
from dpfast.pool import codecs
from dpfast.pool.foreign.images import CLASSES, TABLE
from dpfast.pool.foreign.parquet import arrow_modules
from dpfast.pool.pool import SamplePool
from dpfast.pool.record import COLUMNS, RECORD, as_dict
from dpfast.pool.saver import Saver
from dpfast.textfiles import to_json

FORMATS = ("webdataset", "imagefolder", "parquet")
BATCH = 1000  # samples in memory at a time, and in a row group
FILE_SAMPLES = 50_000  # in one parquet file
SHOWN = 1.0  # seconds between two looks at what a saver has on the disk


def export_pool(
    pool: SamplePool,
    out: Path,
    format: str,
    classes: list[str] | None = None,
    *,
    done: Callable[[int], object] = lambda count: None,
) -> Path:
    """Writes all samples of ``pool`` into the new or empty folder ``out``.

    classes: names of the labels, for folder names and ``ClassLabel`` features; done: called with
    the number of samples of each part that was written.
    Raises ``InputError`` for a folder in use or that cannot be written, an unknown format, labels
    without a name, and a pool that the format cannot hold.
    """
    if format not in FORMATS:
        raise InputError(f"format = {format!r}: expected one of {', '.join(FORMATS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out = {str(out)!r}: exists and is not an empty folder")
    if not len(pool):
        raise InputError("the pool is empty: there is nothing to export")
    if classes is not None:
        class_ids(pool.column("label"), len(pool), "the pool", len(classes))
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
    try:
        _write(pool, out, format, classes, done, pictures=pictures)
    except OSError as error:
        raise InputError(f"out = {str(out)!r}: {error}") from None
    return out


def _write(
    pool: SamplePool,
    out: Path,
    format: str,
    classes: list[str] | None,
    done: Callable[[int], object],
    *,
    pictures: bool,
) -> None:
    if format == "webdataset":
        with Saver(pool, out, images="png" if pictures else "npy", classes=classes) as saver:
            saver.save()
            before = 0
            while before < len(pool):
                saved = saver.wait(SHOWN)
                if saver.error is not None:
                    raise InputError(f"out = {str(out)!r}: {saver.error}")
                done(saved - before)
                before = saved
    elif format == "imagefolder":
        _write_images(pool, out / "train", classes, done)
    else:
        _write_parquet(pool, out, classes, done, pictures=pictures)


def _rows(
    pool: SamplePool, done: Callable[[int], object], *, decoded: bool = False
) -> Iterator[tuple[int, np.ndarray, list[Any]]]:
    """Yields (first row, records, payloads) of BATCH samples at a time; payloads are image files,
    or rows of latents.

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
        done(len(rows))


def _write_images(
    pool: SamplePool, folder: Path, classes: list[str] | None, done: Callable[[int], object]
) -> None:
    suffix = "jpg" if pool.codec == "jpeg" else "png"
    folder.mkdir(parents=True)

    def line(record: np.void, row: int) -> dict[str, Any]:
        label = int(record["label"])
        where = f"{label:04d}" if classes is None else folder_name(label, classes[label])
        return {"file_name": f"{where}/{row:09d}.{suffix}", **as_dict(record)}

    # null where there is none, and datasets takes a column's type from the first 10 MiB of lines
    finite = torch.nonzero(pool.column("entropy").isfinite()).flatten()
    leading = int(finite[0]) if len(finite) else 0
    with (folder / TABLE).open("w", encoding="utf-8") as table:
        if leading:
            table.write(to_json(line(pool.records(leading, leading + 1)[0], leading)) + "\n")
        for first, records, files in _rows(pool, done, decoded=True):
            for row, (record, data) in enumerate(zip(records, files, strict=True), first):
                columns = line(record, row)
                path = folder / columns["file_name"]
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                if not leading or row != leading:
                    table.write(to_json(columns) + "\n")
    if classes is not None:
        (folder.parent / CLASSES).write_text(json.dumps(classes) + "\n", encoding="utf-8")


def _write_parquet(
    pool: SamplePool,
    out: Path,
    classes: list[str] | None,
    done: Callable[[int], object],
    *,
    pictures: bool,
) -> None:
    arrow, parquet = arrow_modules()
    out.mkdir(parents=True, exist_ok=True)
    schema = _schema(arrow, pool, classes, pictures=pictures)
    count = -(-len(pool) // FILE_SAMPLES)
    writer = None
    for first, records, payloads in _rows(pool, done):
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
    """Returns fields with Hugging Face's feature types, so that an image loads as an image and a
    label has its name.
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
        named = name == "label" and classes is not None
        # datasets casts a ClassLabel to int64; the file says so from the start
        fields.append(arrow.field(name, arrow.int64() if named else arrow.from_numpy_dtype(dtype)))
        features[name] = (
            {"names": _distinct(classes or []), "_type": "ClassLabel"}
            if named
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


def _distinct(classes: list[str]) -> list[str]:
    """Returns the names with their label behind those that two classes have ("crane" is a bird and
    a machine): ``datasets`` refuses a ``ClassLabel`` whose names repeat.
    """
    count = Counter(classes)
    return [f"{name} ({label})" if count[name] > 1 else name for label, name in enumerate(classes)]
