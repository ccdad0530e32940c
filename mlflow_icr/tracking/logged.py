"""A training's own values and texts, at its own steps, apart from the measurements of the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow_icr.tracking.event_log import read_operations
from mlflow_icr.tracking.operations import LOGGED, Metrics

FOLDER = "logged"  # of pictures and tables that a training logs


@dataclass(frozen=True)
class Logged:
    """Values and texts by key that were logged together, at `step` (the training's own unit) and `time` (Unix seconds).

    `resumes`: the first entry of a later process, which may repeat steps of an earlier one. For each key, values from here on
    replace earlier values at the same and later steps.
    """

    step: int
    time: float
    values: Mapping[str, float]
    texts: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False


def read_logged(output_dir: Path | str) -> list[Logged]:
    """All values that a training logged itself, in order, with those that it later replaced. Raises FileNotFoundError."""
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such output folder", str(output_dir))
    return [
        Logged(entry.step, entry.time / 1000, entry.values, entry.texts, entry.resumes)
        for entry in read_operations(folder)
        if isinstance(entry, Metrics) and entry.source == LOGGED
    ]
