"""Child processes: their environment, and their end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Collection

from mlflow_icr.environment import cores

GRACE_SECONDS = 300.0  # for a child that was asked to stop: its measurement in progress, its checkpoint


def environment(parallel: int) -> dict[str, str]:
    """The environment of children: each has an MLflow run of its own, and a fair share of the cores."""
    variables = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"}
    # With more threads than cores, waiting threads take the time of working ones, and training crawls.
    threads = variables.get("OMP_NUM_THREADS", "")
    variables["OMP_NUM_THREADS"] = str(max(1, (int(threads) if threads.isdigit() else cores()) // parallel))
    variables["PYTHONUNBUFFERED"] = "1"
    return variables


def end_children(children: Collection[subprocess.Popen[str]]) -> None:
    """Ask children to stop, and wait for that; kill those that do not in time, and all when the wait is interrupted."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
    finally:
        for child in children:
            child.kill()  # no effect on one that has ended
            child.wait()
