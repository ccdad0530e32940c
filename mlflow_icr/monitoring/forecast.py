"""Forecast of when copying begins, from the step at which the error ratio passed a multiple of its baseline.

`forecast.json` is a small table, written by `python -m studies.validation.calibration` from runs that copied: for each multiple
of the baseline, how much later samples held copies, with a conformal interval (Vovk et al. 2005) whose residuals come from data
sets that the centre was not computed on. The forecast uses the highest multiple that was passed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlflow_icr.monitoring.evidence import RatioEvidence

TABLE = Path(__file__).with_name("forecast.json")
# Above this baseline the network knew its images before the clock began, so the clock does not tell when copies come.
HIGHEST_BASELINE = 1.5
NO_EVIDENCE = "the error ratio has not passed {level:g} times its lowest"


@dataclass(frozen=True)
class Level:
    """A multiple of the baseline, and the clock at the onset of copies over the clock at its passing: centre and interval."""

    level: float
    factor: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Forecast:
    """Images seen at which copying is expected, with the bounds of an interval; all None where `absent` says why."""

    images_seen: float | None = None
    low: float | None = None
    high: float | None = None
    share: float = 0.8  # of onsets that lie in such intervals
    because: str = ""
    absent: str = "nothing was measured"

    @property
    def text(self) -> str:
        """The forecast in a sentence."""
        if self.images_seen is None or self.low is None or self.high is None:
            return f"No forecast of copying: {self.absent}."
        bounds = f"{_round(self.low)} to {_round(self.high)}; {self.share:.0%} interval"
        return f"Copying is expected near {_round(self.images_seen)} images seen ({bounds}): {self.because}."

    def values(self) -> dict[str, float]:
        """The forecast as metrics; none where it is absent."""
        by_suffix = {"": self.images_seen, "_low": self.low, "_high": self.high}
        return {f"forecast/images_seen{end}": value for end, value in by_suffix.items() if value is not None}

    def reasons(self) -> dict[str, str]:
        """The reason for its absence, by key; empty where there is a forecast."""
        return {} if self.images_seen is not None else {"forecast/images_seen": self.absent}


def _round(images: float) -> str:
    """Rounded to three digits, which is more than the forecast's accuracy."""
    return f"{float(f'{images:.3g}'):,.0f}"


@cache
def calibration() -> tuple[float, tuple[Level, ...]]:
    """The share of onsets that intervals hold, and the levels of the package's table, the lowest first."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    levels = [Level(**{name: row[name] for name in Level.__dataclass_fields__}) for row in table["levels"]]
    return float(table["share"]), tuple(sorted(levels, key=lambda row: row.level))


class Forecaster:
    """The forecast of a growing history; it reads the ratio's evidence after each row, in constant time."""

    def __init__(self, share_and_levels: tuple[float, Sequence[Level]] | None = None) -> None:
        self._share, self._levels = share_and_levels or calibration()
        self._clear()

    def _clear(self) -> None:
        self._passed: tuple[Level, float] | None = None  # the highest level passed, and the clock there
        self._before = (0.0, 0.0)  # clock and log relative ratio of the last row
        self._now: tuple[float, int, float] = (0.0, 0, 1.0)  # clock, images seen, images seen for each unit of the clock
        self._first: float | None = None

    def add(self, ratio: RatioEvidence, images_seen: int, begins: bool) -> None:
        """Add a row that the ratio's evidence has read already."""
        if begins:
            self._clear()
        clock = ratio.clock.value
        self._now = clock, images_seen, ratio.clock.images_per_unit
        if ratio.relative is None:
            return
        if self._first is None:
            self._first = ratio.baseline
        (clock_before, log_before), log_now = self._before, math.log(ratio.relative)
        for level in self._levels:
            at = math.log(level.level)
            if log_now < at or (self._passed is not None and level.level <= self._passed[0].level):
                continue
            passed = clock
            if clock_before > 0 and log_before < at:  # between the two measurements, on a straight line of logarithms
                part = (at - log_before) / (log_now - log_before)
                passed = math.exp(math.log(clock_before) + part * math.log(clock / clock_before))
            self._passed = level, passed
        self._before = clock, log_now

    @property
    def passed_at(self) -> float | None:
        """The clock where the highest level so far was passed."""
        return None if self._passed is None else self._passed[1]

    def forecast(self, turned: bool, copies: bool) -> Forecast:
        """The forecast after the rows so far, for a run that has `turned`; `copies`: samples already hold copies."""
        if copies:
            return Forecast(absent="samples already hold copies")
        if not self._levels:
            return Forecast(absent="there is no calibration table")
        if self._first is not None and self._first > HIGHEST_BASELINE:
            return Forecast(absent=f"training began before the first measurement, with an error ratio of {self._first:.2f}")
        if not turned:  # the ratio of images that have an upright place also creeps up in runs that copy nothing
            return Forecast(absent="there is no certain evidence of a turn")
        if self._passed is None:
            return Forecast(absent=NO_EVIDENCE.format(level=self._levels[0].level))
        (level, passed), (clock, images, unit) = self._passed, self._now
        near, low, high = (images + (passed * factor - clock) * unit for factor in (level.factor, level.low, level.high))
        at = images + (passed - clock) * unit
        because = f"the error ratio passed {level.level:g} times its lowest at {_round(at)}"
        if high < images:
            because += "; that step has passed, and no two detectors have found copies"
        return Forecast(near, low, high, self._share, because, "")


def scaled_onset(onset_images: float, *, num_images: tuple[float, float], batch_size: tuple[float, float] = (1, 1)) -> float:
    """Images seen at the onset of copies for another number of training images or another batch size; pairs are (from, to).

    The onset is proportional to the number of training images, in optimizer steps (Bonnaire et al. 2025, 2505.17638), so that
    images seen are proportional to the batch size, too. Measured exponents of N are 1.0 to 1.3: see `docs/validation.md`.
    Raises ValueError for numbers that are not positive.
    """
    for name, value in (("onset_images", onset_images), ("num_images", min(num_images)), ("batch_size", min(batch_size))):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; expected a positive number")
    return onset_images * (num_images[1] / num_images[0]) * (batch_size[1] / batch_size[0])


def table_text(share: float, levels: Sequence[Level], runs: Sequence[Mapping[str, object]]) -> str:
    """The text of a calibration table as the package keeps it, with one line for each run that it comes from."""
    rows, lines = (",\n".join(f"  {json.dumps(row)}" for row in part) for part in ([vars(level) for level in levels], runs))
    return f'{{"share": {share},\n "levels": [\n{rows}\n ],\n "runs": [\n{lines}\n ]}}\n'
