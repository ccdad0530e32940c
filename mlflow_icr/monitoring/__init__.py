"""When to measure and what it means: protocol, monitors, report, verdict."""

from mlflow_icr.monitoring.compare import Comparison, compare
from mlflow_icr.monitoring.evidence import Thresholds
from mlflow_icr.monitoring.forecast import Forecast, scaled_onset
from mlflow_icr.monitoring.generation import GenerationMonitor
from mlflow_icr.monitoring.losses import LossMonitor
from mlflow_icr.monitoring.monitor import ICRMonitor
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.schedule import geometric_schedule
from mlflow_icr.monitoring.summary import summarise
from mlflow_icr.monitoring.sweep import LabelledImages, NoiseSweep, sweep_noise
from mlflow_icr.monitoring.verdict import Verdict, VerdictTracker, verdict

__all__ = [
    "Comparison",
    "Forecast",
    "GenerationMonitor",
    "ICRMonitor",
    "LabelledImages",
    "LossMonitor",
    "NoiseSweep",
    "Protocol",
    "Report",
    "Thresholds",
    "Verdict",
    "VerdictTracker",
    "compare",
    "geometric_schedule",
    "scaled_onset",
    "summarise",
    "sweep_noise",
    "verdict",
]
