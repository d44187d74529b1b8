"""What several generators write: tars and parquet files of a few pictures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image


def picture(level: int, side: int = 8) -> bytes:
    """A grey PNG file, all of it of one level: the picture tells which sample it is."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(
    *members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.USTAR_FORMAT
) -> bytes:
    """A tar of files by name and content, and of members that are not files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            out.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, **options: Any) -> None:
    path.write_bytes(tar_of(*members, **options))


def images(files: Sequence[bytes | None]) -> pyarrow.Array:
    """The column that Hugging Face ``datasets`` writes."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([{"bytes": data, "path": None} for data in files], kind)


def parquet(
    path: Path,
    files: Sequence[bytes | None],
    *,
    features: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    **columns: Any,
) -> None:
    """A parquet file of pictures. features: of ``datasets``; metadata: as it stands."""
    table = pyarrow.table({"image": images(files), **columns})
    held = dict(metadata or {})
    if features is not None:
        held["huggingface"] = json.dumps({"info": {"features": features}})
    pyarrow.parquet.write_table(table.replace_schema_metadata(held) if held else table, path)
