"""Reading a pool from a folder: of a run, of a saved or an exported pool, of another's dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from dpfast.config import RECIPE_FILE, SOURCES
from dpfast.data.class_folders import some_of
from dpfast.errors import InputError
from dpfast.files import is_folder, listed, there
from dpfast.pool import codecs, shards
from dpfast.pool.foreign.images import read_images
from dpfast.pool.foreign.intake import Intake
from dpfast.pool.foreign.parquet import read_parquet
from dpfast.pool.foreign.splits import by_split, check_shards, choose, data_files
from dpfast.pool.foreign.tars import read_tars
from dpfast.pool.pool import SamplePool
from dpfast.pool.rank_folders import saved_folders
from dpfast.pool.reader import open_pool

log = logging.getLogger(__name__)


def import_pool(
    folder: Path,
    *,
    decode: codecs.Decode | None = None,
    label_column: str | None = None,
    split: str | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> tuple[SamplePool, list[str] | None]:
    """Returns the samples of a folder in host memory, and the names of their classes where they are
    known.

    A run's folder gives the pool of its source "dp", or of the first that it has of the others. Of
    other people's datasets (parquet, webdataset tars, image folders; at any depth, hidden files
    aside) the label is what is unambiguous: "label", else the only ``ClassLabel``, ``.cls``, or
    class folders.

    Args:
        folder: of a run, a saved pool, an exported one, or a dataset.
        decode: of a saved pool of latents, as of ``SamplePool``.
        label_column: of a dataset, the column, the key or the suffix in a tar that holds the label.
        split: of a dataset, "train", or "train+test" for several, where it has more than one.
        done: called with the number of samples of each part of a dataset that was read.

    Raises ``InputError`` when ``folder`` is none of these, and where a sample, its label or its
    split is not understood.
    """
    try:
        return _pool_of(folder, decode, label_column, split, done)
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be read: {error}") from None


def _pool_of(
    folder: Path,
    decode: codecs.Decode | None,
    label_column: str | None,
    split: str | None,
    done: Callable[[int], object],
) -> tuple[SamplePool, list[str] | None]:
    if not is_folder(folder):
        raise InputError(f"{str(folder)!r}: {'is no' if there(folder) else 'no such'} folder")
    if (saved := saved_pool(folder)) is not None:
        for option, value in (("label_column", label_column), ("split", split)):
            if value is not None:
                raise InputError(
                    f"{option} = {value!r}: {str(folder)!r} is a pool of dpfast, which has "
                    "labels and no splits"
                )
        manifest = saved_folders(saved)[0]
        pool, classes = open_pool(saved, decode=decode), shards.Manifest.read(manifest).classes
        top = int(pool.column("label").max()) if len(pool) else -1
        if classes is not None and top >= len(classes):
            raise shards.DamagedPoolError(
                f"{manifest / shards.MANIFEST} names {len(classes)} classes, a sample's label "
                f"is {top}"
            )
        return pool, classes
    if (folder / RECIPE_FILE).is_file():
        raise InputError(f"{str(folder)!r}: the run has saved no samples")
    return _dataset(folder, label_column, split, done)


def saved_pool(folder: Path) -> Path | None:
    """Returns the saved pool that a folder is, or that the folder of a run holds: of the source
    "dp", else of the first source that has one. It is None where nothing is saved.
    """
    named = [folder / f"pool_{name}" for name in SOURCES]
    own = [path for path in listed(folder, "pool_*") if path not in named]
    return next((place for place in (*named, *own, folder) if saved_folders(place)), None)


def _dataset(
    folder: Path, label_column: str | None, split: str | None, done: Callable[[int], object]
) -> tuple[SamplePool, list[str] | None]:
    found = data_files(folder)
    packed, arrow, tables, images, others = (
        found.pop(kind, []) for kind in ("packed", "arrow", "table", "image", "other")
    )
    if packed:
        raise InputError(f"{folder / packed[0]}: unpack it first")
    if arrow:
        raise InputError(f"{folder / arrow[0]}: write it by to_parquet of datasets first")
    kinds = [*found, *(["image folder"] if tables else [])]
    if len(kinds) > 1:
        raise InputError(
            f"{str(folder)!r} holds several datasets: {', '.join(kinds)}; name the folder of one"
        )
    intake = Intake(done)
    if not found:
        if not (tables or images):
            raise InputError(
                f"{str(folder)!r} holds neither a run with samples nor a saved or exported pool, "
                "nor parquet files, tars or images"
            )
        read_images(folder, tables, images, split, intake, label_column)
        if others:
            listed = some_of([str(file) for file in others])
            log.warning("not read beside the images of %s: %s", folder, listed)
    for kind, files in found.items():
        for part in choose(by_split(files), split, folder).values():
            check_shards(part, folder)
            if len(places := sorted({str(folder / file.parent) for file in part})) > 1:
                raise InputError(
                    f"files of one split lie in several folders: {', '.join(places)}; name one"
                )
            read = read_parquet if kind == "parquet" else read_tars
            read([folder / file for file in part], intake, label_column)
    if not len(intake.pool):
        raise InputError(f"{str(folder)!r}: its {'files' if found else 'tables'} are empty")
    return intake.pool, intake.classes
