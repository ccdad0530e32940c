"""Compare two measurements of one run, paired by image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mlflow_icr.monitoring.series import read_arrays, read_history, series
from mlflow_icr.representation import paired_difference


@dataclass(frozen=True)
class Comparison:
    """The debiased ICR at step b less that at step a, with its confidence interval."""

    difference: float
    low: float
    high: float


def difference_of(a: tuple[float, torch.Tensor], b: tuple[float, torch.Tensor], level: float) -> Comparison:
    """The debiased ICR of b less that of a; each is a debiased ICR and its influences (N,)."""
    difference = b[0] - a[0]
    return Comparison(difference, *paired_difference(a[1], b[1], difference, level))


def compare(step_a: int, step_b: int, *, folder: Path | str, section: str = "repr", level: float = 0.95) -> Comparison:
    """The debiased ICR at step b less that at step a, two measurements of the run in an output folder; steps are images seen.

    Images and views of both are the same, so an image's contributions to both cancel, and the interval is narrower than
    those of the two values suggest. Raises ValueError for a step that the history does not have or that has no interval.
    """
    values = dict(series(read_history(folder), f"{section}/icr_debiased"))
    measurements = []
    for name, step in (("step_a", step_a), ("step_b", step_b)):
        if step not in values:
            available = ", ".join(map(str, values)) or "none"
            raise ValueError(f"{name} is {step}; expected a measurement with {section}/icr_debiased: {available}")
        arrays = read_arrays(folder, step)
        if f"{section}/influence" not in arrays:
            raise ValueError(f"{name} is {step}, a measurement without {section}/influence; expected one with an interval")
        measurements.append((values[step], torch.from_numpy(arrays[f"{section}/influence"])))
    return difference_of(measurements[0], measurements[1], level)
