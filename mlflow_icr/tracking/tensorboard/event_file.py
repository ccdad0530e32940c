"""TensorBoard's event files: append in whole commits, so that a file survives a kill, and read them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlflow_icr.tracking.lock import Lock

# Without it, readers take a file for one of 2015 and drop steps that go down.
FILE_VERSION = "brain.Event:2"


class EventFile:
    """An event file to which whole commits are appended; nothing else stays in it.

    The file is locked from the construction to the end of the `with` block. Raises ValueError when another process is
    writing it, OSError when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.path = path
        why = f"logdir has {str(path.parent)!r}, which another export is writing just now; expected one at a time"
        self._lock = Lock(path.with_name(f".{path.name}.lock"), why)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except BaseException:
            self._lock.release()
            raise
        self._file: Any = os.fdopen(descriptor, "r+b", buffering=1 << 20)
        self.committed = os.fstat(descriptor).st_size  # nothing is cut off before `start`
        self._records = RecordWriter(self._file)
        self._scalar, self._image = Event(), Event()
        self._number = self._scalar.summary.value.add()
        self._picture = self._image.summary.value.add()

    def start(self, committed: int) -> None:
        """Cut off everything after the last commit, which ended at `size` bytes; 0 empties the file."""
        from tensorboard.compat.proto.event_pb2 import Event

        self.committed = committed
        self._file.truncate(committed)
        self._file.seek(committed)
        if not committed:
            self._records.write(Event(wall_time=0.0, file_version=FILE_VERSION).SerializeToString())

    @property
    def waiting(self) -> int:
        """Bytes written since the last commit."""
        return int(self._file.tell()) - self.committed

    def scalar(self, tag: str, step: int, wall_time: float, value: float) -> None:
        """Add a scalar of the plain kind, float32, at a wall time in seconds."""
        # One message is filled again and again: a new one for each point would take most of an export's time.
        self._scalar.step, self._scalar.wall_time = step, wall_time
        self._number.tag, self._number.simple_value = tag, value
        self._records.write(self._scalar.SerializeToString())

    def image(self, tag: str, step: int, wall_time: float, encoded: bytes, width: int, height: int) -> None:
        """Add an encoded image (PNG, JPEG or GIF) of a size in pixels."""
        self._image.step, self._image.wall_time = step, wall_time
        self._picture.tag = tag
        self._picture.image.width, self._picture.image.height = width, height
        self._picture.image.encoded_image_string = encoded
        self._records.write(self._image.SerializeToString())

    def add(self, event: Any) -> None:
        """Add an event as it is."""
        self._records.write(event.SerializeToString())

    def commit(self) -> int:
        """Write everything to the disk; returns the size to pass to `start` the next time."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.committed = int(self._file.tell())
        return self.committed

    def close(self) -> None:
        """Close the file without what was not committed, also when the disk is full."""
        self.__exit__(None, None, None)

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file without what was not committed, also when the disk is full."""
        try:
            self._file.flush()
        except OSError:
            if kind is None:
                raise
        finally:
            os.ftruncate(self._file.fileno(), self.committed)
            self._file.raw.close()
            self._lock.release()


def is_event_file(name: str) -> bool:
    """Whether TensorBoard reads a file of this name as an event file."""
    return "tfevents" in name


def events(path: Path, torn: Callable[[int], object] = lambda offset: None) -> Iterator[Any]:
    """The events of a file up to its end or a damaged record, whose offset `torn` is called with."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    offset = 0
    for record in RawEventFileLoader(str(path)).Load():
        try:
            event = Event.FromString(record)
        except DecodeError:
            break
        offset += len(record) + 16  # length, its checksum, and the record's
        yield event
    if offset < path.stat().st_size:
        torn(offset)


def float32_bits(values: Any) -> np.ndarray:
    """The bits of values as event files hold them, all NaNs and both zeros alike; (N,) int64."""
    with np.errstate(over="ignore"):
        single = np.asarray(values, dtype=np.float64).astype(np.float32) + np.float32(0)
    return np.where(np.isnan(single), np.float32(np.nan), single).view(np.int32).astype(np.int64)


def unseen(points: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Indices of the points (N, 3) that are not among those seen (M, 3), with repetitions counted."""
    both = np.concatenate([seen, points])
    if not len(both):
        return np.zeros(0, dtype=np.int64)
    _, group = np.unique(both, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")  # within a group, those seen come first
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(both), dtype=np.int64)
    rank[order] = np.arange(len(both)) - np.repeat(starts, np.diff(starts, append=len(both)))
    seen_count = np.bincount(group[: len(seen)], minlength=group.max() + 1)[group[len(seen) :]]
    return np.flatnonzero(rank[len(seen) :] - seen_count >= seen_count)


def scalars(path: Path, tag: str) -> np.ndarray:
    """The plain scalars of a tag in a file; (N, 3) step, wall time in ms, bits of the value."""
    rows: list[tuple[int, int]] = []
    values: list[float] = []
    for event in events(path):
        for value in event.summary.value:
            if value.tag == tag and value.HasField("simple_value"):
                rows.append((event.step, round(event.wall_time * 1000)))
                values.append(value.simple_value)
    return as_points([step for step, _ in rows], [wall for _, wall in rows], float32_bits(values))


def as_points(steps: Any, milliseconds: Any, bits: np.ndarray) -> np.ndarray:
    """Points (N, 3) of steps, wall times in ms and values' bits."""
    return np.column_stack([np.asarray(steps, dtype=np.int64), np.asarray(milliseconds, dtype=np.int64), bits])
