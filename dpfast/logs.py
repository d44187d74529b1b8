"""Structured logs of a run: JSON lines, one file for each rank.

    logs/rank-00000.jsonl    {"time": "2026-01-31T12:00:00.123+00:00", "rank": 0, "level": "info",
                              "logger": "dpfast.practice.callbacks", "event": "round",
                              "message": "dp: round 1 is complete", ...}

Everything that ``dpfast`` says through ``logging`` goes there, and every warning; an event of the
loop has its numbers as fields beside the message (``dpfast.practice.callbacks``). A resumed run
goes on in the same files. A full disk costs lines, and one warning.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpfast import launch
from dpfast.errors import InputError, unsaved

LEVELS = ("debug", "info", "warning", "error")
FOLDER = "logs"


def check_level(level: str) -> str:
    """Raises ``InputError`` for another than ``LEVELS``."""
    if level not in LEVELS:
        raise InputError(f"log_level = {level!r}: expected one of {', '.join(LEVELS)}")
    return level


class JsonLines(logging.Formatter):
    """A record as one line of JSON; ``extra={"fields": {...}}`` becomes fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "rank": launch.rank(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogFile(logging.FileHandler):
    """A log that lags behind, or loses lines, where the disk refuses them, and warns of it once."""

    _warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._warned:
            self._warned = True  # the warning comes here as well
            with unsaved(f"{FOLDER}/{Path(self.baseFilename).name} lags behind"):
                raise error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of which emit has warned
            super().close()


@contextlib.contextmanager
def logged(run: Path, level: str = "info") -> Iterator[Path]:
    """Writes this rank's log into ``run`` within a ``with`` block, and gives the file."""
    path = run / FOLDER / f"rank-{launch.rank():05d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(JsonLines())
    log = logging.getLogger("dpfast")
    before, show = log.level, warnings.showwarning

    def showwarning(
        message: Warning | str, category: type[Warning], *rest: Any, **named: Any
    ) -> None:
        log.warning("%s", message, extra={"fields": {"category": category.__name__}})
        show(message, category, *rest, **named)

    log.addHandler(handler)
    log.setLevel(check_level(level).upper())
    warnings.showwarning = showwarning
    try:
        yield path
    finally:
        warnings.showwarning = show
        log.setLevel(before)
        log.removeHandler(handler)
        handler.close()
