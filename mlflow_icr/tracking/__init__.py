"""Where results go: the journal and the event log of a run folder, and from there MLflow and TensorBoard."""

from mlflow_icr.monitoring.series import read_arrays, read_history
from mlflow_icr.tracking.checkpoints.best import best_checkpoint
from mlflow_icr.tracking.folder import check_folder, folder_tracker
from mlflow_icr.tracking.journal import Journal
from mlflow_icr.tracking.logged import Logged, read_logged
from mlflow_icr.tracking.mlflow.sink import MLflowSink
from mlflow_icr.tracking.mlflow.sync import sync
from mlflow_icr.tracking.reactions import VerdictChange
from mlflow_icr.tracking.sink import Sink
from mlflow_icr.tracking.tensorboard.sink import TensorBoardSink
from mlflow_icr.tracking.tracker import Tracker

__all__ = [
    "Journal",
    "Logged",
    "MLflowSink",
    "Sink",
    "TensorBoardSink",
    "Tracker",
    "VerdictChange",
    "best_checkpoint",
    "check_folder",
    "folder_tracker",
    "read_arrays",
    "read_history",
    "read_logged",
    "sync",
]
