"""When to measure and what it means: protocol, monitors, report, verdict."""

from mlflow_icr.monitoring.compare import Comparison, compare
from mlflow_icr.monitoring.generation import GenerationMonitor
from mlflow_icr.monitoring.losses import LossMonitor
from mlflow_icr.monitoring.monitor import ICRMonitor
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.schedule import geometric_schedule
from mlflow_icr.monitoring.summary import summarise
from mlflow_icr.monitoring.sweep import LabelledImages, NoiseSweep, sweep_noise
from mlflow_icr.monitoring.verdict import Thresholds, Verdict, verdict

__all__ = [
    "Comparison",
    "GenerationMonitor",
    "ICRMonitor",
    "LabelledImages",
    "LossMonitor",
    "NoiseSweep",
    "Protocol",
    "Report",
    "Thresholds",
    "Verdict",
    "compare",
    "geometric_schedule",
    "summarise",
    "sweep_noise",
    "verdict",
]
