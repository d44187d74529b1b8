"""The control groups of this process, under version 1 and 2 of Linux: containers and Slurm set
their limits there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dpfast import textfiles

ROOT = Path("/")


def lines(file: Path) -> list[str]:
    """Returns the lines of a file; none where it cannot be read."""
    try:
        return textfiles.lines(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


def number(file: Path) -> int | None:
    """Returns the number that a file of a group holds; None where there is none, or "max"."""
    words = lines(file)
    return int(words[0]) if words and words[0].strip().isdecimal() else None


def groups(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """Yields (version, folder) of this process's group and all around it that can be seen, the
    inner ones first.

    A limit may stand at any of them. Of version 1 they are those of ``controller`` ("memory",
    "cpu"), which has a tree of its own; both versions may be there. Within a container the files
    begin at its own group, whatever that is called outside. root: where "/proc" and "/sys" are.
    """
    own: dict[str, str] = {}
    for line in lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))  # version 2 has one group, under ""
    for line in lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        shown, point = left.split()[3:5]
        kind, _, options = right.split(maxsplit=2)
        if kind not in ("cgroup", "cgroup2") or (
            kind == "cgroup" and controller not in options.split(",")
        ):
            continue
        name = controller if kind == "cgroup" else ""
        if name not in own:
            continue
        top = root / point.lstrip("/")
        inner = own[name].removeprefix(shown.rstrip("/")).lstrip("/")
        folder = top / inner
        if ".." in Path(inner).parts or not folder.is_dir():
            folder = top
        yield (1 if kind == "cgroup" else 2), folder
        while folder != top:
            folder = folder.parent
            yield (1 if kind == "cgroup" else 2), folder
