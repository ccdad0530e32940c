"""Between the trackers: runs of MLflow as event files, and event files as runs of MLflow."""

from mlflow_icr.bridge.tensorboard_export import export_runs
from mlflow_icr.bridge.tensorboard_import import import_runs

__all__ = ["export_runs", "import_runs"]
