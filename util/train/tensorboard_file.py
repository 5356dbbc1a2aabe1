"""An event file of TensorBoard, written in the calling thread: a full disk is the caller's error and no one else's.

SummaryWriter writes in a thread of its own, which prints its traceback and dies.
"""

import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

_PREFIX = "events.out.tfevents."


def event_files(directory: Path) -> list[Path]:
    """Those in ``directory`` and in the directories in it."""
    return sorted(path for where in (directory, *directory.glob("*/")) for path in where.glob(_PREFIX + "*"))


class EventFile:
    """A new event file in ``directory``, which makes TensorBoard forget any earlier one. Raises OSError."""

    def __init__(self, directory: Path):
        directory.mkdir(exist_ok=True)
        name = f"{_PREFIX}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self._file = open(directory / name, "xb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def add(self, values: Mapping[str, float], step: int, wall_time: float) -> None:
        """``values``: tag -> value. Raises OSError."""
        for tag, value in values.items():
            self._write(Event(wall_time=wall_time, step=step, summary=scalar(tag, value)))

    def add_text(self, tag: str, markdown: str, wall_time: float) -> None:
        """Raises OSError. What a console of another encoding has left in ``markdown`` as lone surrogates is escaped."""
        sound = markdown.encode("utf-8", "backslashreplace").decode("utf-8")
        self._write(Event(wall_time=wall_time, step=0, summary=text(tag, sound)))

    def flush(self) -> None:
        """Raises OSError."""
        self._records.flush()

    def close(self) -> None:
        """Raises OSError."""
        self._file.close()
