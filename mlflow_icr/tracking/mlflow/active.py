"""Make the run MLflow's active one in the caller's thread, so that `mlflow.log_metric` goes to it.

`mlflow.start_run(run_id=...)` would send more requests, and `mlflow.end_run` prints the run's address, with the password if the
tracking URI has one. So MLflow's list of active runs is used directly (MLflow 3.17; a test pins it).
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
    """Remove a run that was made active here from the active runs of all threads."""
    from mlflow.tracking.fluent import _active_run_stack

    if run_id in _OURS:
        _OURS.discard(run_id)
        for stack in _active_run_stack.get_all_thread_values().values():
            stack[:] = [run for run in stack if run.info.run_id != run_id]
