"""An output folder with its trackers, MLflow and TensorBoard, also for a training that resumes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.tracking.earlier import OPERATIONS, VALUES
from mlflow_icr.tracking.event_log import EVENTS

if TYPE_CHECKING:
    from mlflow_icr.tracking.reactions import Listener
    from mlflow_icr.tracking.tracker import Tracker


def holds_run(folder: Path) -> bool:
    """Whether a folder holds measurements, or other operations for trackers."""
    return any((folder / name).exists() and (folder / name).stat().st_size for name in (HISTORY, EVENTS, OPERATIONS, VALUES))


def check_writable(name: str, folder: Path) -> None:
    """Make a folder. Raises ValueError, which begins with the name of the argument, if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} is {str(folder)!r}, {error.strerror}; expected a folder that can be written") from None


def check_folder(output_dir: Path | str, resume: bool) -> None:
    """Raise ValueError for a folder that holds a run already, unless it is to be resumed, or holds a damaged history."""
    folder = Path(output_dir)
    if resume:
        if (folder / HISTORY).exists():
            read_history(folder)
    elif holds_run(folder):
        raise ValueError(f"output_dir is {str(output_dir)!r}, which holds a run; expected a new folder, or resume")


def folder_tracker(
    output_dir: Path | str,
    *,
    run_name: str | None = None,
    resume: bool = False,
    log_models: str | None = None,
    register: str | None = None,
    on_verdict: Listener | str | None = None,
) -> Tracker:
    """A tracker of MLflow and of TensorBoard event files in the folder, to be opened on the main process.

    With `resume` it continues the folder's MLflow run. `log_models` and `register` are `MLflowSink`'s, `on_verdict` is
    `Tracker`'s. Raises ValueError as those do.
    """
    from mlflow_icr.tracking.mlflow.sink import MLflowSink
    from mlflow_icr.tracking.tensorboard.sink import TensorBoardSink
    from mlflow_icr.tracking.tracker import ALLOW, NEVER, Tracker

    folder = Path(output_dir)
    server = MLflowSink(run_name=run_name, log_models=log_models, register=register)
    sinks = [server, TensorBoardSink(folder)]
    return Tracker(folder, sinks, resume=ALLOW if resume else NEVER, on_verdict=on_verdict)
