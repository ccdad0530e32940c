"""When to measure and what it means: protocol, monitors, report, summary."""

from mlflow_icr.monitoring.generation import GenerationMonitor
from mlflow_icr.monitoring.losses import LossMonitor
from mlflow_icr.monitoring.monitor import ICRMonitor
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.schedule import geometric_schedule
from mlflow_icr.monitoring.summary import summarise

__all__ = ["GenerationMonitor", "ICRMonitor", "LossMonitor", "Protocol", "Report", "geometric_schedule", "summarise"]
