"""Results in TensorBoard: the same keys over the same steps, hparams in the run's own folder, sample grids."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mlflow_icr.tracking.event_log import Entry
from mlflow_icr.tracking.operations import ALL, EMBEDDING, File, Operation
from mlflow_icr.tracking.sink import Sink
from mlflow_icr.tracking.tensorboard.custom_scalars import layout_summary
from mlflow_icr.tracking.tensorboard.event_file import EventFile, is_event_file
from mlflow_icr.tracking.tensorboard.projector import write_projection
from mlflow_icr.tracking.tensorboard.shown import Book, Shown, all_shown


class TensorBoardSink(Sink):
    """Writes one event file into one folder, on the disk after every measurement. On the main process only.

    `tensorboard.json` beside it has the sink's place in the log, and where the last whole commit ends: a process that resumes
    cuts off what came after that, and reads no event file. Without it, everything is written again.

    Both of TensorBoard's readers hide points, each in its own way. Where a tag's step does not rise, the fast reader drops the
    points of that tag from the step on. At a restart (`SessionLog.START`) the other reader drops the points of all tags from
    its step on. So a point that belongs before existing ones is written after a restart, and later points follow again.
    """

    name = "TensorBoard"
    pace = 3.0

    def __init__(self, log_dir: Path | str) -> None:
        self.log_dir = Path(log_dir).absolute()
        self._file: EventFile | None = None
        self._book: Book | None = None

    def state_path(self, folder: Path) -> Path:
        """`tensorboard.json` beside the event file."""
        return self.log_dir / "tensorboard.json"

    def batch_of(self, lane: str) -> int:
        """The number of values that are written before they are synced to the disk."""
        return 1000

    def open(self, opening: bool, *, offline: bool = False) -> None:
        """Continue the event file, or begin one."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        content = self.state.content
        path = self.log_dir / content.get("file", "")
        hides = False
        if "file" not in content or not path.is_file() or path.stat().st_size < content["committed"]:
            # Event files of a folder that has results hold these, as an earlier version wrote them, or as they were lost.
            has_events = any(is_event_file(name.name) for name in self.log_dir.iterdir() if not name.name.startswith("."))
            hides = has_events and bool(self.log.measured or self.log.logged or self.state.forgot)
            path = self.log_dir / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            while path.exists():
                path = path.with_name(f"{path.name}.0")
            content |= {"file": path.name, "cursors": {}}
        if not content["cursors"]:
            content |= {"committed": 0, "book": {}}
        self._file = EventFile(path)
        begins = not content["committed"]
        self._file.start(content["committed"])
        self._book = Book(self.folder, content["book"])
        if begins:
            for _ in range(2 if hides else 0):
                self._file.add(_restart(0, 0.0))
            self._file.add(_event(0, time.time(), layout_summary()))
            content["committed"] = self._file.commit()
        self.state.write()

    def send(self, lane: str, operations: Sequence[Operation], may_be_repeated: bool) -> None:
        """Append operations to the event file and sync it, or leave it unchanged."""
        assert self._file is not None
        assert self._book is not None
        number, late = self.state.cursor(ALL).number, list[int]()
        try:
            for place, operation in enumerate(operations, number):
                if isinstance(operation, File) and operation.role == EMBEDDING:
                    write_projection(self.log_dir, operation.name, operation.step, self.folder / operation.path)
                addition = self._book.add(operation)
                if addition.cuts:
                    self._write_again(min(addition.cuts.values()), place, addition.cuts)
                self._write(addition.values)
                late += [] if addition.late is None else [addition.late]
                if addition.down and "down" not in self.warned:
                    self.warned.add("down")
                    where = "where that was logged again; MLflow and the log have all values"
                    self.echo(f"TensorBoard: the steps of {addition.down!r} go down; it shows only the newer values {where}")
            if late:
                self._write_again(min(late), number + len(operations))
            self.state.content |= {"committed": self._file.commit(), "book": self._book.state}
        except BaseException:
            self._file.start(self.state.content["committed"])
            self._book = Book(self.folder, self.state.content["book"])
            raise

    def _write(self, values: Iterable[Shown]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self._file is not None
        for (step, seconds), group in groupby(values, key=lambda value: (value.step, value.seconds)):
            self._file.add(_event(step, seconds, Summary(value=[value.value for value in group])))

    def _write_again(self, since: int, until: int, cuts: dict[str, int] | None = None) -> None:
        """Write the values from step `since` on again in order, those of operations before `until` that were not removed."""
        assert self._file is not None
        entries: Iterable[Entry] = self.log.entries()
        values = all_shown(self.folder, (entry.operation for entry in entries if entry.number < until), since)
        values = [value for value in values if value.step < (cuts or {}).get(value.tag, value.step + 1)]
        # TensorBoard's reader takes the first restart of a folder for its beginning, so there are two.
        for _ in range(2):
            self._file.add(_restart(since, values[0].seconds if values else 0.0))
        self._write(values)

    def close(self) -> None:
        """Close the event file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _event(step: int, seconds: float, summary: Any) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=seconds, step=step, summary=summary)


def _restart(step: int, seconds: float) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(wall_time=seconds, step=step, session_log=SessionLog(status=SessionLog.START))
