"""Axes of a chart: the positions of values, and the ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_TICKS = 7


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on an axis from `start` to `end`, in the chart's units; `log` for equal ratios."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; values outside are at the edge."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values between the ends."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / (MOST_TICKS - 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{m}e{d}") for d in decades for m in parts]
        ticks = [value for value in ticks if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(ticks) <= MOST_TICKS:
            break
    if len(ticks) < 2:  # less than a factor of two or three, where equal ratios look like equal steps
        return _linear_ticks(low, high)
    return ticks[:: -(-len(ticks) // MOST_TICKS)]


def scale_of(values: Sequence[float], start: float, end: float, *, log: bool = False, margin: float = 0.05) -> Scale:
    """A scale that holds all values with a margin (a share of their range); one value alone stands in the middle."""
    low, high = min(values), max(values)
    if log:
        spread = (high / low) ** margin if high > low * 1.001 else 2.0
        return Scale(low / spread, high * spread, start, end, True)
    pad = margin * (high - low) if high > low else max(abs(high) * 0.5, 0.5)
    return Scale(low - pad, high + pad, start, end)
