"""Accelerate training programs and experiments on top of `mlflow_icr`."""

from mlflow_icr.environment import wait_passively

wait_passively()  # here, for whatever comes after this loads torch
