"""The report: the result of one measurement."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Report:
    """Values, pictures and absences of one measurement at `step` images seen.

    `values` are finite floats by key, `figures` uint8 pictures (H, W, 3) by key, `absent` reasons by the key that could not be
    computed, `arrays` one number for each probe image (N,) by key, `warnings` remarks on values by their keys, `distributions`
    many numbers (M,) by key, shown as histograms. Raises ValueError for a negative step, a value that is not finite, or a key
    that is both present and absent.
    """

    step: int
    values: Mapping[str, float]
    figures: Mapping[str, np.ndarray] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    protocol_digest: str = ""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    distributions: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", int(self.step))  # may be numpy's or torch's, which JSON does not have
        object.__setattr__(self, "values", {key: float(value) for key, value in self.values.items()})
        if self.step < 0:
            raise ValueError(f"step is {self.step}; expected images seen, >= 0")
        for key, value in self.values.items():
            if not math.isfinite(value):
                raise ValueError(f"{key} is {value}; expected a finite number (leave it out, with its reason in absent)")
        both = self.values.keys() & self.absent.keys()
        if both:
            raise ValueError(f"{', '.join(sorted(both))}: both a value and a reason for its absence")

    def flat(self) -> dict[str, float]:
        """One row of the history: images_seen and every value by its key."""
        return {"images_seen": self.step, **self.values}

    def without(self, keys: Collection[str]) -> Report:
        """The same without the values, pictures and distributions of some keys."""

        def remaining(entries: Mapping[str, T]) -> dict[str, T]:
            return {key: value for key, value in entries.items() if key not in keys}

        return replace(
            self, values=remaining(self.values), figures=remaining(self.figures), distributions=remaining(self.distributions)
        )

    def joined(self, other: Report) -> Report:
        """Both reports of one step as one. Raises ValueError when the steps differ."""
        if other.step != self.step:
            raise ValueError(f"cannot join reports of step {self.step} and step {other.step}")
        return Report(
            self.step,
            {**self.values, **other.values},
            {**self.figures, **other.figures},
            {**self.absent, **other.absent},
            self.protocol_digest or other.protocol_digest,
            {**self.arrays, **other.arrays},
            {**self.warnings, **other.warnings},
            {**self.distributions, **other.distributions},
        )
