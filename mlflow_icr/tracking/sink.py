"""A sink: a place for results. It reads a folder's event log, and keeps its cursor in a file of its own."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.tracking import operations as ops
from mlflow_icr.tracking.event_log import EVENTS, Cursor, EventLog
from mlflow_icr.tracking.operations import ALL, described, to_content

if TYPE_CHECKING:
    from mlflow_icr.tracking.worker import Worker


def echo_on_stderr(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def not_taken(name: str, error: Exception, where: Path) -> str:
    """One line on a sink that fails. It has the error's type only: the error's text may hold an address with a password."""
    return f"{name} does not take results ({type(error).__name__}); training goes on, and everything measured is in {where}"


class Failure(Enum):
    """The meaning of an exception: the server does not answer; this operation is refused; or unknown, and perhaps temporary."""

    OUTAGE = "outage"
    REFUSED = "refused"
    UNCLEAR = "unclear"


class SinkState:
    """The cursors of a sink in the log, for each lane, and refused operations with reasons; a file of the run folder.

    Sinks may keep more in `content`. Threads may share it. A file that belongs to another log is ignored: its folder was
    removed and made again. If the log was restored from an older copy, everything is sent again.
    """

    def __init__(self, path: Path, log: EventLog) -> None:
        self.path, self.lock = path, threading.RLock()
        self.content: dict[str, Any] = {"cursors": {}, "refused": {}}
        try:
            self.content |= json.loads(path.read_text())
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); without it, everything is sent again") from None
        self.forgot = self.content.get("log", log.first) != log.first
        if self.forgot:
            self.content = {"cursors": {}, "refused": {}}
        if log.first:
            self.content["log"] = log.first
        if any(offset > log.end.offset for offset, _ in self.content["cursors"].values()):
            self.content["cursors"] = {}

    def cursor(self, lane: str) -> Cursor:
        """The cursor of a lane."""
        return Cursor(*self.content["cursors"].get(lane, (0, 0)))

    def advance(self, lane: str, cursor: Cursor, *, write: bool = True) -> None:
        """Move the cursor of a lane."""
        with self.lock:
            self.content["cursors"][lane] = [cursor.offset, cursor.number]
            if write:
                self.write()

    @property
    def refused(self) -> Mapping[str, Mapping[str, Any]]:
        """Refused operations: `what`, `why`, `lane` and `operation`, by number in the log."""
        return dict(self.content["refused"])

    def refuse(self, lane: str, number: int, operation: ops.Operation | None, why: str) -> None:
        """Set a refused operation aside, with its reason; None for a line of the log that is not one."""
        what = described(operation) if operation else f"line {number + 1} of {EVENTS}"
        content = to_content(operation) if operation else {}
        with self.lock:
            self.content["refused"][f"{number} {what}"] = {
                "number": number, "what": what, "why": why, "lane": lane, "operation": content,
            }  # fmt: skip
            self.write()

    def accept(self, key: str) -> None:
        """Remove an operation from those set aside: it was accepted."""
        with self.lock:
            self.content["refused"].pop(key, None)
            self.write()

    def update(self, **content: Any) -> None:
        """Update `content`."""
        with self.lock:
            self.content |= content
            self.write()

    def write(self) -> None:
        """Write the state to the disk. Raises OSError."""
        with self.lock:
            text = json.dumps(self.content)
            write_whole(self.path, lambda file: file.write(text.encode()))


class Sink:
    """Base of sinks: override the methods for what the place can show; everything else is ignored. Methods may raise.

    They are called in a thread of the sink, in the log's order. An operation that raises is tried again: without end if the
    connection fails, else three times; then it is set aside with its reason. After a kill, the next process may repeat one
    operation. `remote` sinks wait while a tracker is offline.
    """

    name = "sink"
    remote = False
    lanes: Sequence[str] = (ALL,)
    pace = 0.0  # seconds between two calls of `send`, unless something is urgent

    folder: Path
    log: EventLog
    state: SinkState
    echo: Callable[[str], None]
    warned: set[str]  # keys of warnings that were shown, by all of its workers
    workers: Sequence[Worker] = ()  # the workers that deliver to it, while a tracker is open

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run, if the sink has one."""
        return None

    @property
    def experiment_id(self) -> str | None:
        """The id of the run's experiment, if there is one."""
        return None

    def flush(self) -> bool:
        """Wait until everything is delivered, or cannot be now; returns whether it is, with nothing refused."""
        from mlflow_icr.tracking.worker import drain

        return drain(self.workers)

    @property
    def failure(self) -> Exception | None:
        """Why the last attempt failed, if it did."""
        return next((worker.failure for worker in self.workers if worker.failure is not None), None)

    @property
    def delivered_by(self) -> str:
        """What delivers operations that wait when the run has ended, for messages."""
        return "a tracker that resumes in this folder"

    @property
    def waiting_text(self) -> str:
        """One line on operations that wait; empty if there are none."""
        waiting = sum(worker.waiting for worker in self.workers)
        why = f" ({self.reason_of(self.failure)})" if self.failure else ""
        where = f"{waiting} operations wait in {self.folder}{why}; {self.delivered_by} delivers them"
        return f"{self.name} has not taken everything: {where}" if waiting else ""

    @property
    def refused_text(self) -> str:
        """Refused operations, in a line; empty if there are none."""
        refused = self.state.refused if self.workers else {}
        if not refused:
            return ""
        first = next(iter(refused.values()))
        which = f"{len(refused)} operations, the first of them {first['what']} ({first['why']})"
        return f"{self.name} refused {which}; {self.delivered_by} sends them again"

    def state_path(self, folder: Path) -> Path:
        """The file of the sink's cursors."""
        return folder / f"{self.name.lower()}.json"

    def attach(self, folder: Path, log: EventLog, state: SinkState, echo: Callable[[str], None]) -> None:
        """Attach to the run's folder, its log and the sink's state; `echo` prints a line. Called once, before `open`."""
        self.folder, self.log, self.state, self.echo, self.warned = folder, log, state, echo, set()

    def open(self, opening: bool, *, offline: bool = False) -> None:
        """Get ready, in the caller's thread. Without `opening`, the sink is only brought up to the log."""

    def opened(self) -> None:
        """Called in the caller's thread after the run was opened and threads have started."""

    def in_caller(self) -> None:
        """Called in the caller's thread at every measurement."""

    def send(self, lane: str, operations: Sequence[ops.Operation], may_be_repeated: bool) -> None:
        """Deliver operations in order; `may_be_repeated`: all or some may have arrived before."""
        for operation in operations:
            self.take(operation)

    def take(self, operation: ops.Operation) -> None:
        """Deliver one operation."""
        match operation:
            case ops.Params(values=values):
                self.params(values)
            case ops.Tags(values=values, step=step):
                self.tags(values, step)
            case ops.Metrics(values=values, step=step, time=time):
                self.metrics(values, step, time)
            case ops.Picture(key=key, path=path, step=step):
                self.picture(key, self.folder / path, step)
            case ops.File() as file:
                self.file(self.folder / file.path, file)
            case ops.Dataset(description=description, context=context):
                self.dataset(description, context)
            case ops.Model() as model:
                self.model(self.folder / model.path, model)
            case ops.End(status=status):
                self.end(status)

    def params(self, values: Mapping[str, Any]) -> None:
        """The run's parameters, once for each process that continues it."""

    def tags(self, values: Mapping[str, str], step: int | None) -> None:
        """Texts by key: tags, the verdict, why something is absent."""

    def metrics(self, values: Mapping[str, float], step: int, time: int) -> None:
        """Values by key at a step, and when they were known, in Unix milliseconds."""

    def picture(self, key: str, path: Path, step: int) -> None:
        """A picture of a step, a PNG."""

    def file(self, path: Path, file: ops.File) -> None:
        """A file: its `role` says whether it is an artifact, a figure, a table, distributions or vectors."""

    def dataset(self, description: Mapping[str, str], context: str) -> None:
        """A set of images, as MLflow describes it; `context` is "training" or "validation"."""

    def model(self, path: Path, model: ops.Model) -> None:
        """A checkpoint, a diffusers folder."""

    def end(self, status: str) -> None:
        """The run has ended: FINISHED, FAILED or KILLED."""

    def batch_of(self, lane: str) -> int:
        """The most values of a lane in one `send`."""
        return 1

    def patience_of(self, lane: str) -> float:
        """Seconds without progress after which the end of a run no longer waits for a lane."""
        return 90.0

    def reachable(self) -> bool:
        """Whether the place answers now, within about 3 s."""
        return True

    def look_again(self) -> None:
        """Forget whether the place answered a moment ago: a caller waits now."""

    def failure_of(self, error: Exception) -> Failure:
        """The meaning of an exception of `send`."""
        return Failure.OUTAGE if isinstance(error, (ConnectionError, TimeoutError)) else Failure.UNCLEAR

    def reason_of(self, error: Exception) -> str:
        """An exception in a line, without credentials."""
        return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}" if str(error) else type(error).__name__

    def close(self) -> None:
        """Release all resources; called when everything is delivered, or will be by another process."""
