"""A sink: a place that results go to. It reads a folder's event log; how far it has come is kept in a file of its own."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.tracking import operations as told
from mlflow_icr.tracking.event_log import Cursor, EventLog
from mlflow_icr.tracking.operations import ALL, described, to_content

if TYPE_CHECKING:
    from mlflow_icr.tracking.worker import Worker


def say_on_stderr(text: str) -> None:
    """Show a line to whoever watches the program."""
    print(text, file=sys.stderr, flush=True)


def not_taken(name: str, error: Exception, where: Path) -> str:
    """What is said once of a place that fails. The error's type only: an address with a password can be part of its text."""
    return f"{name} does not take results ({type(error).__name__}); training goes on, and everything measured is in {where}"


class Failure(Enum):
    """What an exception says: nobody answers; this operation is not wanted; or it is not known, and may pass."""

    OUTAGE = "outage"
    REFUSED = "refused"
    UNCLEAR = "unclear"


class SinkState:
    """How far a sink has come in the log, lane by lane, and what was refused, with its reason; a file of the run folder.

    Sinks may keep more in `content`. Threads may share it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.RLock()
        self.content: dict[str, Any] = {"cursors": {}, "refused": {}}
        try:
            self.content |= json.loads(path.read_text())
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); without it, everything is told again") from None

    def cursor(self, lane: str) -> Cursor:
        """Where a lane goes on."""
        return Cursor(*self.content["cursors"].get(lane, (0, 0)))

    def advance(self, lane: str, cursor: Cursor, *, write: bool = True) -> None:
        """A lane has come to a place."""
        with self.lock:
            self.content["cursors"][lane] = [cursor.offset, cursor.number]
            if write:
                self.write()

    @property
    def refused(self) -> Mapping[str, Mapping[str, Any]]:
        """What was set aside: `what`, `why`, `lane` and `operation`, by its number in the log and what it is."""
        return dict(self.content["refused"])

    def refuse(self, lane: str, number: int, operation: told.Operation, why: str) -> None:
        """Set an operation aside, for a reason."""
        what = described(operation)
        with self.lock:
            self.content["refused"][f"{number} {what}"] = {
                "number": number, "what": what, "why": why, "lane": lane, "operation": to_content(operation),
            }  # fmt: skip
            self.write()

    def accept(self, key: str) -> None:
        """What was set aside is taken after all."""
        with self.lock:
            self.content["refused"].pop(key, None)
            self.write()

    def update(self, **content: Any) -> None:
        """Keep some more."""
        with self.lock:
            self.content |= content
            self.write()

    def write(self) -> None:
        """Bring it onto the disk. Raises OSError."""
        with self.lock:
            text = json.dumps(self.content)
            write_whole(self.path, lambda file: file.write(text.encode()))


class Sink:
    """What a place is told: override what it can show, everything else is passed over. Methods may raise.

    They are called in a thread of the sink's own, in the log's order, each operation until it has not raised: a connection
    that fails is tried for ever, anything else three times, and then it is set aside with its reason. A process that is
    killed may have one operation told again by the next. `remote` sinks wait while a tracker is offline.
    """

    name = "sink"
    remote = False
    lanes: Sequence[str] = (ALL,)
    pace = 0.0  # seconds from one `send` to the next, where nothing is urgent

    folder: Path
    log: EventLog
    state: SinkState
    say: Callable[[str], None]
    warned: set[str]  # what was told of, by all of its workers
    workers: Sequence[Worker] = ()  # that bring it what it is told, while a tracker is open

    @property
    def run_id(self) -> str | None:
        """MLflow's run, of a sink that has one."""
        return None

    @property
    def experiment_id(self) -> str | None:
        """Its experiment."""
        return None

    def flush(self) -> bool:
        """Wait until everything is there, or cannot be there now; whether it is, with nothing refused."""
        from mlflow_icr.tracking.worker import drain

        return drain(self.workers)

    @property
    def delivered_by(self) -> str:
        """Who delivers what waits when the run has ended, for whoever is told of it."""
        return "a tracker that goes on in this folder"

    @property
    def waiting_text(self) -> str:
        """What it has not taken, in a line; empty where it has everything."""
        waiting = sum(worker.waiting for worker in self.workers)
        where = f"{waiting} operations wait in {self.folder}; {self.delivered_by} delivers them"
        return f"{self.name} has not taken everything: {where}" if waiting else ""

    @property
    def refused_text(self) -> str:
        """What it did not want, in a line; empty where it wanted everything."""
        refused = self.state.refused if self.workers else {}
        if not refused:
            return ""
        first = next(iter(refused.values()))
        which = f"{len(refused)} operations, the first of them {first['what']} ({first['why']})"
        return f"{self.name} did not want {which}; {self.delivered_by} offers them again"

    def state_path(self, folder: Path) -> Path:
        """Where the sink keeps how far it has come."""
        return folder / f"{self.name.lower()}.json"

    def attach(self, folder: Path, log: EventLog, state: SinkState, say: Callable[[str], None]) -> None:
        """Get the run's folder, its log and how far the sink has come; `say` shows a line to whoever watches."""
        self.folder, self.log, self.state, self.say, self.warned = folder, log, state, say, set()

    def open(self, opening: bool, *, offline: bool = False) -> None:
        """Get ready, in the caller's thread; not `opening`: only to be brought up to the log."""

    def opened(self) -> None:
        """The run was opened, and threads are at work; in the caller's thread."""

    def in_caller(self) -> None:
        """Do what is to be done in the caller's thread; at every measurement."""

    def send(self, lane: str, operations: Sequence[told.Operation], may_be_repeated: bool) -> None:
        """Take operations in order; `may_be_repeated`: they may have arrived before, in part or as a whole."""
        for operation in operations:
            self.take(operation)

    def take(self, operation: told.Operation) -> None:
        """Take one operation."""
        match operation:
            case told.Params(values=values):
                self.params(values)
            case told.Tags(values=values, step=step):
                self.tags(values, step)
            case told.Metrics(values=values, step=step, time=time):
                self.metrics(values, step, time)
            case told.Picture(key=key, path=path, step=step):
                self.picture(key, self.folder / path, step)
            case told.File() as file:
                self.file(self.folder / file.path, file)
            case told.Dataset(description=description, context=context):
                self.dataset(description, context)
            case told.Model() as model:
                self.model(self.folder / model.path, model)
            case told.End(status=status):
                self.end(status)

    def params(self, values: Mapping[str, Any]) -> None:
        """The run's parameters; once for each process that goes on with it."""

    def tags(self, values: Mapping[str, str], step: int | None) -> None:
        """Texts by key: tags, the verdict, why something is absent."""

    def metrics(self, values: Mapping[str, float], step: int, time: int) -> None:
        """Values by key at a step, and when they were known, in Unix milliseconds."""

    def picture(self, key: str, path: Path, step: int) -> None:
        """A picture of a step, a PNG."""

    def file(self, path: Path, file: told.File) -> None:
        """A file: its `role` says whether it is an artifact, a figure, a table, distributions or vectors."""

    def dataset(self, description: Mapping[str, str], context: str) -> None:
        """A set of images, as MLflow describes it; `context` is "training" or "validation"."""

    def model(self, path: Path, model: told.Model) -> None:
        """A checkpoint, a diffusers folder."""

    def end(self, status: str) -> None:
        """The run has ended: FINISHED, FAILED or KILLED."""

    def batch_of(self, lane: str) -> int:
        """How many values `send` gets at a time of a lane."""
        return 1

    def patience_of(self, lane: str) -> float:
        """Seconds without progress after which the end of a run waits no more for a lane."""
        return 90.0

    def reachable(self) -> bool:
        """Whether the place answers just now, within some 3 s."""
        return True

    def failure_of(self, error: Exception) -> Failure:
        """What an exception of `send` says."""
        return Failure.OUTAGE if isinstance(error, (ConnectionError, TimeoutError)) else Failure.UNCLEAR

    def reason_of(self, error: Exception) -> str:
        """An exception in a line, without credentials."""
        return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}" if str(error) else type(error).__name__

    def close(self) -> None:
        """Let go of everything; called when all was told, or will be told by another process."""
