"""Bringing an MLflow server up to the journals of output folders, after an outage or a kill."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow_icr.monitoring.series import HISTORY
from mlflow_icr.tracking.mlflow.outbox import MODELS, OPERATIONS
from mlflow_icr.tracking.mlflow.sink import MLflowSink
from mlflow_icr.tracking.tracker import Tracker


@dataclass(frozen=True)
class Synced:
    """What was delivered of one folder to a run: operations taken now, those that wait still, and refusals by place."""

    folder: Path
    run_id: str | None
    delivered: int
    waiting: int
    refused: dict[str, str]
    failure: Exception | None

    @property
    def complete(self) -> bool:
        """Whether the server has everything."""
        return not self.waiting and not self.refused


def folders_of(folder: Path) -> list[Path]:
    """The folders at and below a path that hold a journal or an outbox. Raises ValueError when there are none."""
    found = {path.parent for name in (HISTORY, OPERATIONS) for path in folder.rglob(name)}
    if not found:
        raise ValueError(f"folder is {str(folder)!r}, which holds no {HISTORY}; expected the output folder of a run or study")
    return sorted(found)


def sync_folder(folder: Path, *, new_run: bool = False, status: str = "KILLED") -> Synced:
    """Deliver what the server does not have of one folder; a run whose process was killed is ended with a status.

    As often as it is repeated, everything is there once. With `new_run` everything goes to a new run, on another server for
    instance. Raises ValueError for a folder that a process is writing just now, or a damaged journal.
    """
    sink = MLflowSink()
    sink.bind(folder)
    assert sink.outbox is not None
    if new_run:
        sink.start_over()
    if not sink.outbox.count:  # measured without MLflow, or by a process that came no further
        sink.open({}, {})
    tracker = Tracker(folder, [])
    tracker.replay(sink)
    tracker.keep(sink)
    boxes = [box for box in (sink.outbox, sink.models) if box is not None]
    before = sum(len(box.waiting) for box in boxes) if sink.outbox.run_id else sum(box.count for box in boxes)
    told = [logging.getLogger(f"mlflow_icr.tracking.mlflow.{name}") for name in ("sink", "courier")]
    disabled = [logger.disabled for logger in told]
    for logger in told:
        logger.disabled = True  # the caller tells of failures
    try:
        sink.close(status)  # which a run that has ended ignores
    finally:
        for logger, was in zip(told, disabled, strict=True):
            logger.disabled = was
    waiting = sum(len(box.waiting) for box in boxes)
    refused = dict(sink.outbox.refused)
    if sink.models is not None:
        refused |= {f"{place} of {MODELS}": why for place, why in sink.models.refused.items()}
    return Synced(folder, sink.run_id, max(0, before - waiting), waiting, refused, sink.failure if waiting else None)


def sync(folder: Path, *, new_run: bool = False, say: Callable[[str], None] = lambda text: None) -> list[Synced]:
    """Deliver what the server does not have of a run's or a study's folder; `say` hears a line for each."""
    found = []
    for part in folders_of(folder):
        done = sync_folder(part, new_run=new_run)
        found.append(done)
        state = (
            f"{done.delivered} operations delivered to run {done.run_id}"
            if done.delivered
            else f"everything was delivered to run {done.run_id}"
        )
        if done.waiting:
            state = f"{done.delivered} operations delivered" if done.delivered else "everything was delivered"
        state += f" to run {done.run_id}"
        for place, why in done.refused.items():
            state += f"; refused: operation {place} ({why})"
        say(f"{part}: {state}")
    return found
