"""The folders in which the ranks of a run save their samples, each in one of its own.

    pool_dp/rank-000-of-002/       a saved pool (``dpfast.pool.shards``) of the rows that this rank
                                   holds, in order
    pool_dp/rank-001-of-002/

One process alone saves into the folder itself. A run that goes on with another number of ranks
reads the old folders (``dpfast.pool.reader``), holds other rows and saves them anew beside the old
ones, which are removed when no checkpoint needs them any more.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from dpfast.files import listed, there
from dpfast.parallel import Ranks
from dpfast.pool import shards

RANK_FOLDERS = "rank-*-of-*"


def rank_folder_name(ranks: Ranks, rank: int | None = None) -> str:
    """Returns the name of the folder of ``rank``, this one by default."""
    return f"rank-{ranks.rank if rank is None else rank:03d}-of-{ranks.size:03d}"


def rank_folder(folder: Path, ranks: Ranks, rank: int | None = None) -> Path:
    """Returns the folder of a rank's samples under ``folder``, the saved pool of a run."""
    return folder if ranks.alone else folder / rank_folder_name(ranks, rank)


def rank_folders(folder: Path) -> dict[Path, int]:
    """Returns the folders of ranks below ``folder``, each with the number of the ranks; other
    names, as of backups, are passed over.
    """
    named = {path: re.fullmatch("rank-[0-9]+-of-([0-9]+)", path.name) for path in listed(folder)}
    return {path: int(name[1]) for path, name in named.items() if name and path.is_dir()}


def saved_folders(folder: Path) -> list[Path]:
    """Returns the saved pools that make one: ``folder`` itself, or those of its ranks; those of the
    most samples where other numbers of ranks have saved as well.

    Empty where nothing is saved.
    """
    sizes = rank_folders(folder)
    found = [[folder]] if there(folder / shards.MANIFEST) else []
    found += [
        [path for path, size in sizes.items() if size == each]
        for each in sorted(set(sizes.values()))
    ]
    saved = [[path for path in paths if there(path / shards.MANIFEST)] for paths in found]
    return max(
        saved,
        key=lambda paths: sum(shards.Manifest.read(path).samples for path in paths),
        default=[],
    )


def remove_rank_folders(folder: Path, sizes: Collection[int]) -> None:
    """Removes under ``folder``, the saved pool of a run, what other numbers of ranks than ``sizes``
    have saved.

    The manifest of a folder goes first: killed on the way, the rest is no saved pool, and who saves
    there begins anew.
    """
    entries = list(folder.iterdir())
    for entry, size in rank_folders(folder).items():
        if size not in sizes:
            _forget(entry)
            shutil.rmtree(entry)
    own = [entry for entry in entries if not entry.match(RANK_FOLDERS)]
    if 1 not in sizes and own:
        _forget(folder)
        for entry in own:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def _forget(folder: Path) -> None:
    """Makes a saved pool none, for good."""
    (folder / shards.MANIFEST).unlink(missing_ok=True)
    shards.sync_folder(folder)
