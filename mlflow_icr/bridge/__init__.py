"""Export of MLflow runs to TensorBoard event files, and import of event files as MLflow runs."""

from mlflow_icr.bridge.tensorboard_export import export_runs
from mlflow_icr.bridge.tensorboard_import import import_runs

__all__ = ["export_runs", "import_runs"]
