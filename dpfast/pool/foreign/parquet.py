"""Parquet files: our own export, and images as Hugging Face ``datasets`` writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpfast.errors import InputError, first_line
from dpfast.extras import install_command
from dpfast.labels import class_id, label_column
from dpfast.pool.foreign.intake import BATCH, Intake
from dpfast.pool.record import COLUMNS
from dpfast.textfiles import parse_json


def arrow_modules() -> tuple[Any, Any]:
    """Returns pyarrow and pyarrow.parquet. Raises ``InputError`` with what to install."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"parquet files need pyarrow; {install_command('pyarrow')}") from None
    return pyarrow, pyarrow.parquet


def read_parquet(paths: Iterable[Path], intake: Intake, wanted: str | None) -> None:
    """Appends the rows of ``paths``.

    The image is the column "image", else the only one of images; the label is the column
    ``wanted``, else "label", else the only ``ClassLabel``. Raises ``InputError`` that names file
    and row.
    """
    arrow, parquet = arrow_modules()
    for path in paths:
        try:
            with parquet.ParquetFile(path) as file:
                _read(file, path, intake, wanted)
        except InputError:
            raise
        except (arrow.ArrowException, OSError, UnicodeError) as error:
            raise InputError(f"{path}: {first_line(error)}") from None


@dataclass(frozen=True)
class Columns:
    """The columns of a file. payload: the column of images or arrays; shape and dtype: of arrays,
    None of images; label: the labels' column; classes: their names.
    """

    payload: str
    label: str
    classes: object
    shape: tuple[int, ...] | None = None
    dtype: np.dtype | None = None


def _read(file: Any, path: Path, intake: Intake, wanted: str | None) -> None:
    schema = file.schema_arrow
    columns = _columns(schema, path, wanted)
    count = len(intake.name_classes(columns.classes, str(path)) or ()) or None
    # a column of another type than ours bears its name by chance
    ours = [name for name in COLUMNS if name in schema.names]
    read = list(dict.fromkeys([columns.payload, columns.label, *ours]))
    if twice := [name for name in read if schema.names.count(name) > 1]:
        raise InputError(f"{path}: the column {twice[0]!r} stands in it twice")
    first = 0
    for batch in file.iter_batches(BATCH, columns=read):
        places = [f"{path}, row {first + i}" for i in range(batch.num_rows)]
        first += batch.num_rows
        values = {name: batch.column(name).to_pylist() for name in read if name != columns.payload}
        values["label"] = [
            class_id(value, place, count)
            for value, place in zip(values[columns.label], places, strict=True)
        ]
        rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        payload = batch.column(columns.payload)
        if columns.shape is None:
            files = [_file(value, p) for value, p in zip(payload.to_pylist(), places, strict=True)]
            if places:
                intake.image_files(places, files, rows)
        elif places:
            intake.arrays(places, list(_arrays(payload, columns, places)), rows)


def _columns(schema: Any, path: Path, wanted: str | None) -> Columns:
    metadata = schema.metadata or {}
    features = _features(metadata, path)
    class_labels = [
        name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"
    ]
    label = label_column(schema.names, class_labels, wanted, str(path))
    classes = features.get(label, {}).get("names") if label in class_labels else None
    if b"dpfast" not in metadata:
        return Columns(_picture_column(schema, features, path), label, classes)
    about = parse_json(metadata[b"dpfast"], f"{path}: its metadata 'dpfast'")
    try:
        codec, shape, ours = about["codec"], about["shape"], about["classes"]
        classes = ours if label == "label" else classes
        if "latent" not in schema.names:
            return Columns(_picture_column(schema, features, path), label, classes)
        size = tuple(int(s) for s in shape)
        return Columns("latent", label, classes, size, _dtype(codec))
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{path}: its metadata 'dpfast' is not that of dpfast export") from None


def _dtype(codec: str) -> np.dtype:
    return np.dtype({"pixels": np.uint8, "latents": np.float16}[codec])


def _features(metadata: dict[bytes, bytes], path: Path) -> dict[str, dict[str, Any]]:
    """Returns the features that Hugging Face's metadata declare, by column."""
    table = parse_json(metadata.get(b"huggingface", b"{}"), f"{path}: its metadata 'huggingface'")
    for key in ("info", "features"):
        table = table.get(key) if isinstance(table, dict) else None
    if not isinstance(table, dict):
        return {}
    return {name: feature for name, feature in table.items() if isinstance(feature, dict)}


def _picture_column(schema: Any, features: dict[str, dict[str, Any]], path: Path) -> str:
    """Returns the column of images: declared so, or of the type that Hugging Face stores them
    in.
    """
    found = [
        field.name
        for field in schema
        if features.get(field.name, {}).get("_type") == "Image"
        or {inner.name for inner in _inner(field.type)} == {"bytes", "path"}
    ]
    if "image" in found:
        return "image"
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{field.name!r} ({field.type})" for field in schema)
    problem = "has no column of image files" if not found else "has several columns of images"
    raise InputError(f"{path} {problem} and none is called 'image'; its columns are {listed}")


def _inner(kind: Any) -> Iterator[Any]:
    """Yields the fields of a struct; none of another type."""
    if kind.num_fields and hasattr(kind, "field") and str(kind).startswith("struct"):
        yield from (kind.field(i) for i in range(kind.num_fields))


def _file(value: object, place: str) -> bytes:
    """Returns the image file of a row."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise InputError(
                f"{place}: holds the path {value['path']!r} of an image and not its bytes; write "
                "the file anew with the images in it"
            )
        value = value.get("bytes")
    if value is None:
        raise InputError(f"{place}: has no image")
    if not isinstance(value, bytes):
        raise InputError(f"{place}: holds a {type(value).__name__} and no image file")
    return value


def _arrays(column: Any, columns: Columns, places: list[str]) -> np.ndarray:
    """Returns (B, *shape) of a column of lists."""
    assert columns.shape is not None
    for value, place in zip(column, places, strict=True):
        if not value.is_valid or len(value) != int(np.prod(columns.shape)):
            raise InputError(f"{place}: its latent is not of shape {columns.shape}")
    values = column.flatten().to_numpy(zero_copy_only=False)
    if values.dtype != columns.dtype:
        raise InputError(f"{places[0]}: its latent is {values.dtype}, expected {columns.dtype}")
    return np.array(values).reshape(len(places), *columns.shape)
