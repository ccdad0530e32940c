"""Adapters: networks of other libraries as denoisers, one small file for each kind of condition."""

from mlflow_icr.extraction.adapters.choose import adapt, adapt_pipeline
from mlflow_icr.extraction.adapters.classes import ClassCondition
from mlflow_icr.extraction.adapters.flux import FluxCondition
from mlflow_icr.extraction.adapters.function import FunctionDenoiser
from mlflow_icr.extraction.adapters.sd3 import SD3Condition
from mlflow_icr.extraction.adapters.text import TextCondition

__all__ = [
    "ClassCondition",
    "FluxCondition",
    "FunctionDenoiser",
    "SD3Condition",
    "TextCondition",
    "adapt",
    "adapt_pipeline",
]
