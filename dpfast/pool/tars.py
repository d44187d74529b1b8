"""Reading webdataset shards: tar files in which the members of a sample lie side by side."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np

from dpfast.errors import InputError
from dpfast.files import is_no_data

BLOCK = 512  # of a tar
ZEROS = 1 << 20  # bytes behind an archive that are looked at together


@dataclass(frozen=True)
class TarSample:
    """The members of one sample: suffix -> (position, length) in the file."""

    key: str
    members: dict[str, tuple[int, int]]
    read: Callable[[str], bytes]


def read_tar(path: Path) -> Iterator[TarSample]:
    """Yields the samples of a webdataset shard, in order; of several tars behind each other, all of
    them.

    Keys are as the webdataset library reads them: the name to the first dot of its last part. What
    is hidden is passed over. Raises ``InputError`` for a member that must not be there, for a
    sample whose members stand apart or twice, and for a file that is torn or damaged.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None

    def read(key: str, suffix: str, span: tuple[int, int] | None) -> bytes:
        if span is None:
            raise InputError(f"{path}: sample {key!r} has no .{suffix}")
        if sum(span) > len(data):
            raise InputError(f"{path} ends inside a member")
        return data[span[0] : sum(span)].tobytes()

    def sample(key: str, members: dict[str, tuple[int, int]]) -> TarSample:
        return TarSample(key, members, lambda suffix: read(key, suffix, members.get(suffix)))

    for archive in _archives(path, data):
        key: str | None = None
        members: dict[str, tuple[int, int]] = {}
        seen: set[str] = set()
        for member in archive:
            name = PurePosixPath(member.name)
            stem, _, suffix = name.name.partition(".")
            suffix = suffix.lower()  # as the webdataset library reads it
            stem = str(name.with_name(stem)) if stem else str(name)
            if stem != key:
                if key is not None:
                    yield sample(key, members)
                if stem in seen:
                    raise InputError(
                        f"{path}: members of sample {stem!r} stand in two places; expected those "
                        "of a sample side by side"
                    )
                seen.add(stem)
                key, members = stem, {}
            if suffix in members:
                raise InputError(f"{path}: member {member.name!r} stands in it twice")
            members[suffix] = (member.offset_data, member.size)
        if key is not None:
            yield sample(key, members)


def _archives(path: Path, data: np.ndarray) -> Iterator[Iterator[tarfile.TarInfo]]:
    """Yields the tars that lie behind each other in a file, as ``cat`` makes them. tarfile ends at
    the first one's end mark, and at a damaged header as if it were one.
    """
    start = 0
    with path.open("rb") as file:
        while start < len(data):
            file.seek(start)
            with _refusals(path):
                tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, it is the file's
            yield _files(tar, path)
            end = tar.offset
            if end + BLOCK > len(data):
                # tarfile takes a tar that ends between two members for a whole one
                raise InputError(f"{path} is torn: it has no end mark")
            start = _next_byte(data, end) // BLOCK * BLOCK
            if start == end:
                raise InputError(f"{path} is damaged: no member begins at byte {end}")


def _files(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the members that are files. Folders and what is hidden are passed over, anything else
    is refused.
    """
    with _refusals(path):
        for member in tar:
            check_member(member.name, path)
            if member.issparse() or not (member.isreg() or member.isdir()):
                kind = "a sparse file" if member.issparse() else "a link or a device"
                raise InputError(f"{path}: member {member.name!r} is {kind}, expected plain files")
            if member.isreg() and not is_hidden(PurePosixPath(member.name)):
                yield member


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Names the file in what tarfile refuses."""
    try:
        yield
    except InputError:
        raise
    except (tarfile.TarError, ValueError, OSError) as error:
        raise InputError(f"{path}: {error}") from None


def _next_byte(data: np.ndarray, start: int) -> int:
    """Returns the end of the zeros that begin at ``start``."""
    for first in range(start, len(data), ZEROS):
        found = np.flatnonzero(data[first : first + ZEROS])
        if len(found):
            return first + int(found[0])
    return len(data) + BLOCK


def is_hidden(path: PurePath) -> bool:
    """Returns True if a relative path is that of a hidden file, or in a hidden folder: what a Mac
    adds (.DS_Store, ._0.png, __MACOSX) and what tools keep for themselves is no data. So are, as
    ``datasets`` has it, all folders that begin with "__".
    """
    return any(map(is_no_data, path.parts)) or any(
        part.startswith("__") for part in path.parts[:-1]
    )


def check_member(name: str, where: Any) -> None:
    """Raises ``InputError`` for a name that leads out of a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise InputError(f"{where}: member {name!r} has an absolute path or '..' in it")
