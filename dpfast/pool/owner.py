"""One process at a time writes a folder, on any file system that its nodes share: no ``flock``, no
server.

    .owner-000003      who writes: host, process and a beat that rises every ``BEAT`` seconds

The owner is who made the file with the highest number, which ``O_CREAT | O_EXCL`` gives to one
process alone, over NFS and on Lustre as well. Nobody removes or replaces a number that may be the
highest, so there is no moment at which two take the same one over. A process that finds an owner
takes the next number only where that one is gone:

    on the same host   its process has ended (a process is known by its id and its start)
    on another host    its beat has not risen for ``STALE`` seconds by the newcomer's own clock

An owner that was taken for dead, after a minute without running, sees the higher number and writes
nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

BEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # seconds without one, after which a process on another host is taken for dead


class OwnedError(RuntimeError):
    """An error for a folder that another process writes; the message names it."""


class Owner:
    """Makes this process the one that writes ``folder``, until ``close``.

    Raises ``OwnedError`` when another process lives that does, ``OSError`` with its own words for
    whatever the file system refuses. Waits up to ``STALE`` seconds for a sign of life of a process
    on another host.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        number = _highest(folder)
        if number is not None and _lives(_path(folder, number)):
            raise OwnedError(f"{_named(_path(folder, number))} writes in {str(folder)!r}")
        self.number = 0 if number is None else number + 1
        self.path = _path(folder, self.number)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise OwnedError(
                f"{_named(self.path)} has just begun to write in {str(folder)!r}"
            ) from None
        self._state: dict[str, Any] = {**_process(os.getpid()), "beat": 0, "ended": False}
        self._write()
        for before in _numbers(folder):
            if before < self.number:
                _path(folder, before).unlink(missing_ok=True)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="dpfast-owner", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ``OwnedError`` when another process has taken the folder over, which it believed
        to be left.
        """
        number = _highest(self.folder)
        if number != self.number:
            whom = "nobody" if number is None else _named(_path(self.folder, number))
            raise OwnedError(
                f"{str(self.folder)!r} has been taken over by {whom}; nothing more is written"
            )

    def close(self) -> None:
        """Leaves the folder to the next one. The file stays and says so: its number must not be
        given twice.
        """
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the folder may have been removed
            self._state["ended"] = True
            self._write()
        os.close(self._file)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # a full disk: the next beat may get through
                self._state["beat"] += 1
                self._write()

    def _write(self) -> None:
        text = json.dumps(self._state).encode()
        os.pwrite(self._file, text.ljust(512), 0)
        os.fsync(self._file)


def owner_of(folder: Path) -> str | None:
    """Returns the living process that writes ``folder``, in words; None where there is none. It may
    wait as ``Owner`` does.
    """
    number = _highest(folder) if folder.is_dir() else None
    return (
        _named(_path(folder, number))
        if number is not None and _lives(_path(folder, number))
        else None
    )


def _path(folder: Path, number: int) -> Path:
    return folder / f".owner-{number:06d}"


def _highest(folder: Path) -> int | None:
    return max(_numbers(folder), default=None)


def _numbers(folder: Path) -> list[int]:
    """Returns the numbers of a folder's owners; files of other names, as copies have, are none."""
    named = (re.fullmatch(r"\.owner-([0-9]{6}|[1-9][0-9]{6,})", n) for n in os.listdir(folder))
    return [int(name[1]) for name in named if name]


def _read(path: Path) -> dict[str, Any]:
    """Returns the words of an owner; empty while it is being written, or where it has been
    removed.
    """
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _lives(path: Path) -> bool:
    """Returns True if the process that made ``path`` is still there."""
    first = _read(path)
    if first.get("ended"):
        return False
    start, process = first.get("start"), first.get("process")
    if first.get("host") == _host() and start is not None and isinstance(process, int):
        return _process(process)["start"] == start
    deadline = time.monotonic() + STALE
    while time.monotonic() < deadline:
        now = _read(path)
        if now.get("ended"):
            return False
        if now != first and (first or now.get("host") != _host()):
            return True
        if not first and now:
            return _lives(path)
        time.sleep(min(0.2, STALE / 10))
    return False


def _named(path: Path) -> str:
    state = _read(path)
    return f"process {state['process']} on {state['name']}" if state else "another process"


def _process(number: int) -> dict[str, Any]:
    """Returns a process of this host. start: tells it from others of its number; None once it has
    ended, and without /proc.
    """
    state = ""
    start = None
    with contextlib.suppress(OSError, IndexError):
        fields = (
            Path(f"/proc/{number}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rsplit(")", 1)[1]
            .split()
        )
        state = fields[0]
        start = fields[19]
    return {
        "host": _host(),
        "name": socket.gethostname(),
        "process": number,
        "start": None if state in ("Z", "X") else start,
    }


def _host() -> str:
    """Returns the key that processes which see each other share: name, boot, and the name space of
    their numbers (a container's).
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return " ".join(parts)
