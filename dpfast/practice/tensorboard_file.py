"""Numbers for TensorBoard, in a file of its own format."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from dpfast.extras import require


class TensorBoardFile:
    """Writes scalars into ``events.out.tfevents.*`` of a folder, at once and in the caller's
    thread.

    ``SummaryWriter`` has a thread for it, which dies with a traceback on a full disk. Here every
    call that the disk refuses raises ``OSError`` and closes the file, which may end in half a
    record.
    """

    def __init__(self, folder: Path) -> None:
        require("tensorboard")
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        host = socket.gethostname()
        now = time.time_ns()
        self._file = (
            folder / f"events.out.tfevents.{now // 10**9:010d}.{host}.{os.getpid()}.{now}"
        ).open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds the numbers of a step by their tags."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(
            value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._file.flush()
        except OSError:
            with contextlib.suppress(OSError):  # of the record that is still in its buffer
                self._file.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
