"""Files and folders as other users and other systems leave them: those that may not be read are
named, hidden ones are no data, links are followed.

``Path.glob`` and ``Path.rglob`` pass over folders that may not be read, and follow links to folders
in some versions of Python alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from dpfast.errors import UnreadableError

# Folders that systems leave among other people's files: of a Mac's archive, of Python, of a
# Synology's thumbnails, of ext4 and of Windows.
NO_DATA = (
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
)


def is_no_data(name: str) -> bool:
    """Returns True if an entry of this name is hidden, or one of ``NO_DATA``."""
    return name.startswith(".") or name in NO_DATA


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a refusal of the file system into an ``UnreadableError`` that names the file, ``path``
    where the refusal names none.
    """
    try:
        yield
    except PermissionError as error:
        raise UnreadableError(
            f"{error.filename or path}: cannot be read: {error.strerror}"
        ) from None


def check_readable(*paths: Path) -> None:
    """Opens each file for reading, for libraries that take one that may not be read for missing.

    Raises ``UnreadableError`` with its path; ``FileNotFoundError`` where there is none.
    """
    for path in paths:
        with reading(path), path.open("rb"):
            pass


def there(path: Path) -> bool:
    """Returns True if there is a file or folder, links followed.

    ``Path.is_file`` raises or says no, by Python's version, where the folder around it may not be
    searched; this raises ``UnreadableError``.
    """
    with reading(path):
        try:
            path.stat()
        except (OSError, ValueError) as error:
            if not _absent(error):
                raise
            return False
    return True


def is_folder(path: Path) -> bool:
    """Returns True if there is such a folder, links followed. Raises what ``there`` raises."""
    return there(path) and path.is_dir()


def _absent(error: OSError | ValueError) -> bool:
    """Returns True if an error of the file system says that there is nothing of this name: also
    because it takes no such name, too long or with a null byte, or a link leads to itself.
    """
    if isinstance(error, OSError):
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
    return True


def listed(folder: Path, pattern: str = "*") -> list[Path]:
    """Returns the entries of a folder whose names match ``pattern``, sorted; [] where there is no
    folder.

    Hidden entries (``is_no_data``) only where the pattern begins with a dot. Raises
    ``UnreadableError`` where the folder may not be read.
    """
    with reading(folder):
        try:
            names = os.listdir(folder)
        except (OSError, ValueError) as error:
            if not _absent(error):
                raise
            return []
    hidden = pattern.startswith(".")
    return sorted(
        folder / name
        for name in names
        if fnmatchcase(name, pattern) and (hidden or not is_no_data(name))
    )


def numbered(folder: Path, form: str) -> dict[int, Path]:
    """Returns the entries of a folder by their numbers, rising, whose names are ``form`` of a
    number, as "step-{:09d}"; other names, of copies for instance, are passed over. Raises what
    ``listed`` raises.
    """
    before, after = re.split(r"\{.*\}", form)
    found = {}
    for path in listed(folder):
        digits = path.name.removeprefix(before).removesuffix(after)
        if re.fullmatch("[0-9]+", digits) and form.format(int(digits)) == path.name:
            found[int(digits)] = path
    return dict(sorted(found.items()))


def below(folder: Path) -> Iterator[Path]:
    """Returns the files in a folder at any depth, by name within each folder; hidden files and
    folders are passed over.

    Links are followed, as torchvision's ``ImageFolder`` does; one to a folder around it ends there,
    where torchvision goes round until the system refuses. Raises ``UnreadableError`` for a folder
    that may not be read.
    """
    return _below(folder, ())


def _below(folder: Path, around: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    with reading(folder):
        place = folder.stat()
    own = (place.st_dev, place.st_ino)
    if own in around:
        return
    for entry in listed(folder):
        if entry.is_dir():
            yield from _below(entry, (*around, own))
        elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is not passed over
            yield entry
