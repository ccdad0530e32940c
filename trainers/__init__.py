"""Accelerate training programs and experiments on top of `mlflow_icr`."""

from mlflow_icr.environment import wait_passively

wait_passively()  # set here, before torch is loaded
