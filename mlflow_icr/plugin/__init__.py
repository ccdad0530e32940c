"""Doors for MLflow: an evaluator, a run context and dataset constructors, which MLflow finds by their entry points."""

# First of all: MLflow, while it starts, loads modules of this package. Where one of them were imported before MLflow, MLflow
# would find it half done, warn, and go without it.
import mlflow as mlflow
