"""The report of a run, on one HTML page that needs no network and opens in MLflow's artifact viewer."""

from mlflow_icr.reporting.gather import Gathered, gather, gather_all, gather_folder, gather_run
from mlflow_icr.reporting.material import RunMaterial
from mlflow_icr.reporting.report import conclude, log_report, report_command, write_report

__all__ = [
    "Gathered",
    "RunMaterial",
    "conclude",
    "gather",
    "gather_all",
    "gather_folder",
    "gather_run",
    "log_report",
    "report_command",
    "write_report",
]
