"""What a folder of event files shows, and how a part of it is said again: points that came late, or take others back.

Both of TensorBoard's readers hide points, each in its own way. The fast one drops, of a tag whose step does not go up, all that
it had from that step on. The other one drops everything from the step of a restart on (`SessionLog.START`), of all tags. So
what is said after others, and belongs before them, is written with a restart, and what is to stay is said again in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow_icr.tracking.tensorboard.event_file import events, is_event_file


def shown_events(log_dir: Path, since: int) -> list[Any]:
    """The events with values from a step on that a folder's files show, in the order in which they were written."""
    found: list[Any] = []
    for event in all_events(log_dir):
        if is_restart(event):
            found = [earlier for earlier in found if earlier.step < event.step]
        elif event.summary.value and event.step >= since:
            found.append(event)
    return found


def all_events(log_dir: Path) -> Iterator[Any]:
    """Every event of a folder's files, in the order in which TensorBoard reads them."""
    for path in sorted(path for path in log_dir.glob("*") if is_event_file(path.name)):
        yield from events(path)


def is_restart(event: Any) -> bool:
    """Whether an event says that what was written of its step and later ones does not count."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    return bool(event.HasField("session_log") and event.session_log.status == SessionLog.START)


def restart_events(log_dir: Path, since: int, cuts: Mapping[str, int]) -> list[Any]:
    """What to write for a folder to show its events of step `since` and later in order, without each tag's from its cut on.

    The first event is the restart; TensorBoard's reader takes the first one of a folder for its beginning, so there are two.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary

    again = []
    for event in shown_events(log_dir, since):
        values = [value for value in event.summary.value if event.step < cuts.get(value.tag, event.step + 1)]
        if values:
            again.append(Event(wall_time=event.wall_time, step=event.step, summary=Summary(value=values)))
    again.sort(key=lambda event: event.step)
    wall_time = again[0].wall_time if again else 0.0
    start = Event(wall_time=wall_time, step=since, session_log=SessionLog(status=SessionLog.START))
    return [start, start, *again]
