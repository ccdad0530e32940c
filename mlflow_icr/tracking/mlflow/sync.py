"""Bring an MLflow server up to the logs of run folders, after an outage or a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_icr.monitoring.series import HISTORY
from mlflow_icr.tracking.earlier import OPERATIONS
from mlflow_icr.tracking.event_log import EVENTS, EventLog
from mlflow_icr.tracking.folder import holds_run
from mlflow_icr.tracking.mlflow.sink import STATE_FILE, MLflowSink
from mlflow_icr.tracking.operations import End, now_ms
from mlflow_icr.tracking.sink import SinkState
from mlflow_icr.tracking.tracker import ALLOW, ONLINE, Tracker
from mlflow_icr.tracking.worker import LAST_ATTEMPTS, drain


@dataclass(frozen=True)
class Synced:
    """The result for one folder: operations delivered now, those that wait by lane, and refusals with reasons.

    `failed` is why the folder could not be read.
    """

    folder: Path
    run_id: str | None
    target: str
    delivered: int = 0
    waiting: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    failed: str = ""

    @property
    def complete(self) -> bool:
        """Whether the server has everything."""
        return not (any(self.waiting.values()) or self.refused or self.failed)

    @property
    def text(self) -> str:
        """The result in one line."""
        waiting = {lane: count for lane, count in self.waiting.items() if count}
        where = f"run {self.run_id}" if self.run_id else "a new run"
        parts = [self.failed] if self.failed else []
        if self.delivered:
            parts.append(f"{self.delivered} operations delivered to {where}")
        elif self.complete and self.run_id:
            parts.append(f"everything was delivered to {where}")
        if waiting:
            lanes = ", ".join(f"{count} of {lane}" for lane, count in waiting.items())
            why = f": {self.reason}" if self.reason else ""
            parts.append(f"{sum(waiting.values())} operations wait for {where} of {self.target} ({lanes}){why}")
        parts += [f"refused: {what} ({why})" for what, why in self.refused.items()]
        return f"{self.folder}: {'; '.join(parts) or 'there is nothing to deliver'}"


def folders_of(folder: Path) -> list[Path]:
    """The folders at and below a path that hold a journal or a log. Raises ValueError when there are none."""
    folders = {path.parent for name in (HISTORY, EVENTS, OPERATIONS) for path in folder.rglob(name)}
    folders = {path for path in folders if holds_run(path)}
    if not folders:
        raise ValueError(f"folder is {str(folder)!r}, which holds no {HISTORY}; expected the output folder of a run or study")
    return sorted(folders)


def _refusals(state: SinkState) -> dict[str, str]:
    return {f"operation {entry['number']}, {entry['what']}": entry["why"] for entry in state.refused.values()}


def _state_files(folder: Path) -> list[str]:
    """The state files of a folder's MLflow sinks; a second sink has `mlflow_.json`."""
    return sorted(path.name for path in folder.glob("mlflow*.json") if not path.stem.removeprefix("mlflow").strip("_"))


def deliver_folder(
    folder: Path,
    *,
    new_run: bool = False,
    tracking_uri: str | None = None,
    status: str = "KILLED",
    state_file: str = STATE_FILE,
) -> Synced:
    """Deliver what the server does not have of one folder; a run whose process was killed is ended with a status.

    Idempotent. Refused operations are sent again. The server is the folder's, or `tracking_uri` if that server has moved; with
    `new_run` everything goes to a new run there, or on the server of this process. Raises ValueError for a folder that a
    process is writing, or a damaged journal.
    """
    sink = MLflowSink(tracking_uri=tracking_uri, starts_over=new_run)
    sink.state_file = state_file  # of a tracker with several servers
    tracker = Tracker(folder, [sink], resume=ALLOW, mode=ONLINE)
    tracker.quiet = True
    try:
        SinkState(sink.state_path(folder), tracker.log_file)  # damaged, it says so
        tracker.begin()
        if tracker.log_file.status is None and tracker.log_file.end.number:
            tracker.log_file.append([End(status, now_ms())])
        if sink.reachable() and sink.state.content.get("run_id"):
            for worker in tracker.workers:
                worker.retry_refused()
        drain(tracker.workers, patience=LAST_ATTEMPTS, closing=True)
        failure = sink.failure
        return Synced(
            folder,
            sink.run_id,
            sink.target.uri,
            sum(worker.delivered for worker in tracker.workers),
            {worker.lane: worker.waiting for worker in tracker.workers},
            _refusals(sink.state),
            "" if failure is None else sink.reason_of(failure),
        )
    finally:
        tracker.abandon()


def waiting_of(folder: Path, state_file: str = STATE_FILE) -> Synced:
    """The undelivered operations of one folder; takes no lock and delivers nothing."""
    log = EventLog(folder, read_only=True)
    state = SinkState(folder / state_file, log)
    counts = {lane: log.count(state.cursor(lane), lane) for lane in MLflowSink.lanes}
    target: Mapping[str, Any] = state.content.get("target", {})
    return Synced(
        folder, state.content.get("run_id"), str(target.get("uri", "this process's server")), 0, counts, _refusals(state)
    )


def sync(
    folder: Path,
    *,
    new_run: bool = False,
    tracking_uri: str | None = None,
    dry_run: bool = False,
    echo: Callable[[str], None] = lambda text: None,
) -> list[Synced]:
    """Deliver what the server does not have of a run's or a study's folder; `echo` gets a line for each.

    With `dry_run` the undelivered operations are only listed. Of several folders, one that is in use or
    damaged is named, and the others are delivered.
    """
    folders, deliveries = folders_of(folder), []
    parts = [(part, name) for part in folders for name in _state_files(part) or [STATE_FILE]]
    for part, name in parts:
        try:
            if dry_run:
                done = waiting_of(part, name)
            else:
                done = deliver_folder(part, new_run=new_run, tracking_uri=tracking_uri, state_file=name)
        except (ValueError, OSError) as error:
            if len(folders) == 1:
                raise
            done = Synced(part, None, "", failed=str(error))
        deliveries.append(done)
        echo(done.text)
    return deliveries
