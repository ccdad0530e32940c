"""Plugins for MLflow: an evaluator, a run context and dataset constructors, which MLflow finds by their entry points."""

# MLflow must be imported first: while it starts, it loads modules of this package. If one of them were imported before, MLflow
# would find it half imported, warn, and ignore it.
import mlflow as mlflow
