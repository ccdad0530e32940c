"""Runs with checkpoints, without the training: what several tests look at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlflow_icr import Report
from mlflow_icr.tracking import MLflowSink, Tracker
from mlflow_icr.tracking.checkpoints.folder import checkpoint_path

STEPS = (0, 100, 200, 300)
ICR = {0: 0.9, 100: 0.3, 200: 0.2, 300: 0.4}


def measured(tracker: Tracker, step: int, pipeline: Path) -> None:
    """What a trainer does at a measurement, without the training."""
    tracker.record(Report(step, {"repr/icr": ICR.get(step, 0.5), "mem/ratio_l2": step / 1000, "loss/train": 1 / (step + 3)}))
    part = tracker.journal.folder / "part"
    shutil.copytree(pipeline, part)
    path = checkpoint_path(tracker.journal.folder, step)
    path.parent.mkdir(exist_ok=True)
    part.rename(path)
    tracker.checkpoint(step)


def trained(folder: Path, pipeline: Path, log_models: str = "all", register: str | None = None) -> MLflowSink:
    """A run with four measurements."""
    sink = MLflowSink(log_models=log_models, register=register)
    tracker = Tracker(folder, [sink])
    tracker.open({"seed": 1}, {})
    for step in STEPS:
        measured(tracker, step, pipeline)
    tracker.close("FINISHED")
    return sink


def models_of(run_id: str | None) -> dict[int, Any]:
    """The run's models as the store has them; none is there twice."""
    from mlflow import MlflowClient

    found = MlflowClient().search_logged_models(["0"], f"source_run_id = '{run_id}'")
    names = [model.name for model in found]
    assert len(set(names)) == len(names)
    return {int(model.tags["images_seen"]): model for model in found}
