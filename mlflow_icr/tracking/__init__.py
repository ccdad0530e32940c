"""Where results go: the journal, and from it MLflow and TensorBoard."""

from mlflow_icr.monitoring.series import read_arrays, read_history
from mlflow_icr.tracking.best import best_checkpoint
from mlflow_icr.tracking.folder import check_folder, folder_tracker
from mlflow_icr.tracking.journal import Journal
from mlflow_icr.tracking.logged import Logged, read_logged
from mlflow_icr.tracking.mlflow_sink import MLflowSink
from mlflow_icr.tracking.sync import sync
from mlflow_icr.tracking.tensorboard_export import export_runs
from mlflow_icr.tracking.tensorboard_import import import_runs
from mlflow_icr.tracking.tensorboard_sink import TensorBoardSink
from mlflow_icr.tracking.tracker import Sink, Tracker

__all__ = [
    "Journal",
    "Logged",
    "MLflowSink",
    "Sink",
    "TensorBoardSink",
    "Tracker",
    "best_checkpoint",
    "check_folder",
    "export_runs",
    "folder_tracker",
    "import_runs",
    "read_arrays",
    "read_history",
    "read_logged",
    "sync",
]
