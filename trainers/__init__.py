"""Accelerate training programs and experiments on top of `mlflow_icr`."""
