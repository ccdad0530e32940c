"""An output folder with its trackers: MLflow and TensorBoard, and the run that a resumed training goes on in."""

from __future__ import annotations

from pathlib import Path

from mlflow_icr.monitoring.series import HISTORY, read_history
from mlflow_icr.tracking.logged import FOLDER, VALUES
from mlflow_icr.tracking.mlflow.outbox import OPERATIONS
from mlflow_icr.tracking.mlflow.sink import MLflowSink
from mlflow_icr.tracking.tensorboard.sink import TensorBoardSink
from mlflow_icr.tracking.tracker import Tracker


def check_folder(output_dir: Path | str, resume: bool) -> None:
    """Raise ValueError for a folder that holds a run already, unless it is to be resumed, or holds a damaged history."""
    folder = Path(output_dir)
    if resume:
        if (folder / HISTORY).exists():
            read_history(folder)
    elif any((folder / name).exists() for name in (HISTORY, OPERATIONS, f"{FOLDER}/{VALUES}")):
        raise ValueError(f"output_dir is {str(output_dir)!r}, which holds a run; expected a new folder, or resume")


def folder_tracker(
    output_dir: Path | str, *, run_name: str | None = None, resume: bool = False, log_models: str | None = None
) -> Tracker:
    """A tracker of MLflow and of `tensorboard/` in the folder, to be opened on the main process.

    With `resume` it goes on in the MLflow run that the folder belongs to. `log_models` is `MLflowSink`'s. Raises ValueError as
    `check_folder` and `MLflowSink` do.
    """
    check_folder(output_dir, resume)
    folder = Path(output_dir)
    return Tracker(folder, [MLflowSink(run_name=run_name, log_models=log_models), TensorBoardSink(folder / "tensorboard")])
