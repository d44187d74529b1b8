"""Numbers for TensorBoard, in a file of its own format."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any, BinaryIO

from dpfast.errors import unsaved


class TensorBoardFile:
    """Writes scalars into ``events.out.tfevents.*`` of a folder, at once and in the caller's
    thread.

    ``SummaryWriter`` has a thread for it, which dies with a traceback on a full disk. Here the
    first call that the disk refuses closes the file, which may end in half a record, and warns.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None  # None: not begun, or given up

    def begin(self) -> None:
        """Makes the file."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        host = socket.gethostname()
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{host}.{os.getpid()}.{now}"
        with self._refused():
            self._file = (self._folder / name).open("wb")
            self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds the numbers of a step by their tags."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        file = self._file
        if file is None:
            return
        self._file = None  # given up, unless the disk takes it
        with self._refused():
            try:
                self._records.write(event.SerializeToString())
                file.flush()
                self._file = file
            except OSError:
                with contextlib.suppress(OSError):  # of the record that is still in its buffer
                    file.close()
                raise

    def _refused(self) -> contextlib.AbstractContextManager[None]:
        return unsaved(
            "TensorBoard's events end here", "metrics.jsonl and timings.jsonl have the numbers"
        )

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
