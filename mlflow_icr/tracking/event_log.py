"""The event log of a run folder, `events.jsonl`: one operation a line, in order. Lines are only appended."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.files import append_line, fsync_path
from mlflow_icr.tracking.earlier import write_events
from mlflow_icr.tracking.operations import (
    ALL,
    MEASURED,
    End,
    Metrics,
    Model,
    Operation,
    Params,
    from_line,
    lane_of,
    to_line,
)  # fmt: skip

EVENTS = "events.jsonl"
MEASURED_STEP = re.compile(rb'\{"kind": "metrics", "step": (\d+),')
BATCH_BYTES = 4 * 2**20  # bytes of the log that are read at a time, so that a sink that was away for days costs no memory


@dataclass(frozen=True)
class Entry:
    """An operation, its number in the log, and where in the file the next one begins."""

    number: int
    end: int
    operation: Operation


@dataclass(frozen=True)
class Cursor:
    """A place in the log: bytes, and operations, before it."""

    offset: int = 0
    number: int = 0


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


def _kind(line: bytes) -> str:
    """The kind of a line, which is its first value, without parsing the rest."""
    return line[10 : line.find(b'"', 10)].decode("utf-8", "replace") if line.startswith(b'{"kind": "') else ""


class EventLog:
    """The log of a folder, for one process; several threads may append and read.

    `changed` is notified after each append. A folder of the earlier format is converted.
    """

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.folder, self.path = folder, folder / EVENTS
        self.changed = threading.Condition(threading.RLock())
        self.status: str | None = None  # how the run ended; None if it has not begun, or is going on
        self.params: dict[str, Any] = {}  # a parameter of a run keeps its first value
        self.models: dict[int, bool] = {}  # checkpoints by step, and whether one was logged as kept
        self.turning: int | None = None  # the checkpoint to keep
        self.measured: dict[int, Cursor] = {}  # where the line of each step's measurement begins, in their order
        self.logged = False  # whether it has values of a training's own
        self.summary: Metrics | None = None  # the summary of the run, when it ended last
        self.end = Cursor()
        self.first = ""  # a digest of the first line, which tells logs apart
        self.urgent = 0  # urgent operations end here, in bytes
        self.closed = False  # another process may have the folder: nothing is added any more
        self._unsynced = False
        if not self.path.exists() and not read_only:
            write_events(folder, self.path)
        if self.path.exists():
            self._scan(read_only)

    def _scan(self, read_only: bool) -> None:
        """Read the log's state of the run, and cut off an incomplete last line, which was never acknowledged."""
        offset = number = 0
        summary = b""
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    if not read_only:
                        os.truncate(self.path, offset)
                    break
                kind = _kind(line)
                self.first = self.first or _digest(line)
                if kind in ("params", "end", "model"):
                    try:
                        self._note(from_line(line), Cursor(offset, number))
                    except ValueError as error:
                        raise ValueError(f"{self.path}, line {number + 1}: {error}") from None
                elif kind == "metrics":
                    if b'"source": "logged"' in line:
                        self.logged = True
                    elif b'"source": "summary"' in line:
                        summary = line
                    elif b'"source": ' not in line and (step := MEASURED_STEP.match(line)):
                        self.measured[int(step[1])] = Cursor(offset, number)
                offset, number = offset + len(line), number + 1
        self.end = Cursor(offset, number)
        newest = from_line(summary) if summary else None
        self.summary = newest if isinstance(newest, Metrics) else None

    def _note(self, operation: Operation, at: Cursor) -> None:
        match operation:
            case Params(values=values):
                self.status = None
                self.params = {**values, **self.params}
            case End(status=status):
                self.status = status
            case Model(step=step, kept=kept, turning=turning):
                self.models[step] = self.models.get(step, False) or kept
                self.turning = turning
            case Metrics(step=step, source=source):
                if source == MEASURED:
                    self.measured[step] = at
                self.logged = self.logged or source == "logged"

    def append(self, operations: Sequence[Operation], *, urgent: bool = True) -> None:
        """Add operations, all or none; they survive the process, and a power cut with the next `sync`. Raises OSError.

        Those that are not `urgent` may wait some seconds for others.
        """
        with self.changed:
            if not operations or self.closed:
                return
            lines = [to_line(operation) for operation in operations]
            self.first = self.first or _digest(lines[0].encode())
            self._unsynced = True
            try:
                append_line(self.path, "".join(lines), sync=False, at=self.end.offset)
                for operation, line in zip(operations, lines, strict=True):
                    self._note(operation, self.end)
                    self.end = Cursor(self.end.offset + len(line.encode()), self.end.number + 1)
            except KeyboardInterrupt:  # of a notebook that goes on
                os.truncate(self.path, self.end.offset)
                raise
            if urgent:
                self.urgent = self.end.offset
            self.changed.notify_all()

    def sync(self) -> None:
        """fsync what was appended, before it is sent: after a power cut it would be sent twice. Raises OSError."""
        if self._unsynced:
            self._unsynced = False  # read first: what is added meanwhile may not be on the disk
            try:
                fsync_path(self.path)
            except OSError:
                self._unsynced = True
                raise

    def read(
        self,
        since: Cursor,
        lane: str = ALL,
        limit: int = 2000,
        *,
        damaged: Callable[[int, str], object] = lambda number, why: None,
    ) -> tuple[list[Entry], Cursor]:
        """Operations of a lane from a cursor on, at most so many values and 4 MiB; and the cursor after them.

        A line that is not an operation is left out; `damaged` gets its number and why. Raises OSError for a file that was cut.
        """
        entries: list[Entry] = []
        offset, number, values = since.offset, since.number, 0
        with self.path.open("rb") as file:
            file.seek(offset)
            while values < limit and offset < self.end.offset and offset - since.offset < BATCH_BYTES:
                line = file.readline()
                if not line:
                    raise OSError(errno.ESTALE, "another process has cut or replaced it", str(self.path))
                if lane in (ALL, lane_of(_kind(line))):
                    try:
                        operation = from_line(line)
                    except ValueError as error:
                        damaged(number, str(error))
                    else:
                        held = len(operation.values) if isinstance(operation, Metrics) else 1
                        if entries and values + held > limit:
                            break
                        values += max(1, held)
                        entries.append(Entry(number, offset + len(line), operation))
                offset, number = offset + len(line), number + 1
        return entries, Cursor(offset, number)

    def entries(self, since: Cursor = Cursor()) -> Iterator[Entry]:
        """All operations from a cursor on."""
        while since.offset < self.end.offset:
            batch, since = self.read(since)
            yield from batch

    def time_of(self, step: int) -> int | None:
        """When a step was measured, in ms."""
        for line in _lines(self.path, b'{"kind": "metrics", "step": %d,' % step):
            if b'"source": ' not in line:
                return int(json.loads(line)["time"])
        return None

    def count(self, since: Cursor, lane: str) -> int:
        """The number of operations of a lane from a cursor on."""
        if lane == ALL or since.offset >= self.end.offset:
            return self.end.number - since.number
        with self.path.open("rb") as file:
            file.seek(since.offset)
            return sum(lane_of(_kind(line)) == lane for line in file if line.endswith(b"\n"))


def _lines(path: Path, start: bytes) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.startswith(start) and line.endswith(b"\n"))


def read_operations(folder: Path | str) -> Iterator[Operation]:
    """The operations of a folder's log, of either format, without taking its lock; damaged lines are skipped."""
    folder = Path(folder)
    if not (folder / EVENTS).exists():
        from mlflow_icr.tracking.earlier import earlier_operations

        yield from earlier_operations(folder)
        return
    with (folder / EVENTS).open("rb") as file:
        for line in file:
            try:
                yield from_line(line)
            except ValueError:
                continue


def ended_as(folder: Path | str) -> str | None:
    """How the run of an output folder ended: FINISHED, FAILED or KILLED; None if none was started, or one is going on.

    It takes no lock, so it also works while the run is being written. Raises ValueError naming a damaged line.
    """
    path, status = Path(folder) / EVENTS, None
    if not path.exists():
        ends = [o for o in read_operations(folder) if isinstance(o, (Params, End))]
        return ends[-1].status if ends and isinstance(ends[-1], End) else None
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            kind = _kind(line)
            try:
                if kind in ("params", "end"):
                    operation = from_line(line)
                    status = operation.status if isinstance(operation, End) else None
                elif not kind:
                    from_line(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return status
