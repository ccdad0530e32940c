"""What a training logs of its own: plain values and texts at its own steps, beside the measurements of the journal."""

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

    `resumes`: it is the first of a later process, which may come by steps again that an earlier one had logged already. Of
    each key, what is logged from here on counts in place of what was logged before at the same step and later ones.
    """

    step: int
    time: float
    values: Mapping[str, float]
    texts: Mapping[str, str] = field(default_factory=dict)
    resumes: bool = False


def read_logged(output_dir: Path | str) -> list[Logged]:
    """All that a training logged of its own, in order, also what a resumed one took back. Raises FileNotFoundError."""
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such output folder", str(output_dir))
    return [
        Logged(told.step, told.time / 1000, told.values, told.texts, told.resumes)
        for told in read_operations(folder)
        if isinstance(told, Metrics) and told.source == LOGGED
    ]
