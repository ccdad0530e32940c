"""The run as MLflow's active one in the caller's thread, so that `mlflow.log_metric` beside a tracker goes to it.

`mlflow.start_run(run_id=...)` would ask the server some more, and `mlflow.end_run` prints the run's address, with the password
where the tracking URI has one; so its list of active runs is used as it is (MLflow 3.17; a test pins it).
"""

from __future__ import annotations

from typing import Any

_OURS: set[str] = set()  # ids of runs that were made active here


def users_run() -> Any:
    """The active run, unless it is one that was made active here."""
    import mlflow

    active = mlflow.active_run()
    return None if active is None or active.info.run_id in _OURS else active


def activate(run: Any) -> None:
    """Make a run the active one of this thread."""
    from mlflow.tracking.fluent import ActiveRun, _active_run_stack

    _OURS.add(run.info.run_id)
    _active_run_stack.get().append(ActiveRun(run))


def deactivate(run_id: str) -> None:
    """Take a run that was made active here out of the active ones, of whichever thread."""
    from mlflow.tracking.fluent import _active_run_stack

    if run_id in _OURS:
        _OURS.discard(run_id)
        for stack in _active_run_stack.get_all_thread_values().values():
            stack[:] = [run for run in stack if run.info.run_id != run_id]
