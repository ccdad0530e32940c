"""The verdict: what a history of measurements says a model is doing, how sure that is, and which checkpoint to keep.

It reads `repr/*` alone: no samples, no labels, nothing held out. Two kinds of evidence, each with its certainty:

1. The *view error ratio* R, how much better the network denoises its training images than views of them, grows slowly while
   it learns what images share, and faster than that once it learns its images by heart. Its rate is the elasticity
   e = d log R / d log(images seen), a least-squares slope over the last doubling of images seen. Where e leaves the range of
   models that generalize, learning has turned.
2. The *rise* of the debiased ICR over its lowest value, paired image by image, confirmed by both energies: the residual one
   grows while the invariant one no longer keeps up. ICR creeps up a little in models that copy nothing, so only a rise
   larger than theirs counts.

`docs/validation.md` says how the thresholds were chosen and how often the verdict was right on runs they were not chosen on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlflow_icr.monitoring.series import Rows, rows_of, series

GENERALIZING, TURNING, MEMORIZING, UNDECIDED = "generalizing", "turning", "memorizing", "undecided"


@dataclass(frozen=True)
class Thresholds:
    """Where evidence counts; the defaults are those of `docs/validation.md`."""

    elasticity: float = 0.6  # of the view error ratio, for a turn
    # Below this the ratio is on its way from 1, where an untrained network's is, at whatever rate the first lessons take.
    smallest_ratio: float = 2.0
    memorizing_ratio: float = 8.0  # view error ratio from which copies are to be expected
    rise: float = 0.05  # of the debiased ICR, ICR units, for a turn
    memorizing_growth: float = 4.0  # of the Fisher residual energy since the lowest ICR, with twice that rise: copies
    window: float = 2.0  # images seen now over images seen at the start of the slope's window
    fewest_points: int = 3  # in a window


@dataclass(frozen=True)
class Verdict:
    """What a history says: `state`, the turn in images seen with its bounds, the evidence in words, the checkpoint to keep.

    `turning_images_seen`, `low` and `high` are None before a turn. `checkpoint_images_seen` is the measurement to keep: the
    last one up to the turn, or the newest while there is none; None for an empty history.
    """

    state: str
    turning_images_seen: int | None
    low: int | None
    high: int | None
    evidence: tuple[str, ...]
    checkpoint_images_seen: int | None

    @property
    def text(self) -> str:
        """The verdict in a few lines, Markdown."""
        lines = [f"**{self.state}**"]
        if self.turning_images_seen is not None:
            lines.append(f"turned at {self.turning_images_seen:,} images seen ({self.low:,} to {self.high:,})")
        lines += self.evidence
        if self.checkpoint_images_seen is not None:
            lines.append(f"checkpoint to keep: {self.checkpoint_images_seen:,} images seen")
        return "\n\n".join(lines)

    def summary(self) -> dict[str, float]:
        """The numbers that a run table can be sorted by."""
        found = {
            "turning_images_seen": self.turning_images_seen,
            "turning_images_seen_low": self.low,
            "turning_images_seen_high": self.high,
            "checkpoint_images_seen": self.checkpoint_images_seen,
        }
        return {key: float(value) for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class _Turn:
    at: int
    low: int
    high: int
    evidence: str


@dataclass(frozen=True)
class _Evidence:
    """One kind of evidence: a turn if it shows one, what it says now, and whether it has enough, is in doubt, or is far on."""

    turn: _Turn | None
    says: str
    enough: bool = False
    doubtful: bool = False
    far: bool = False


@dataclass(frozen=True)
class Slope:
    """The elasticity at a measurement, with the bounds that the ratio's own intervals leave it; `since` starts its window.

    `ratio` is the view error ratio there, `reach` the half-width of its logarithm's interval.
    """

    images_seen: int
    since: int
    ratio: float
    reach: float
    value: float
    low: float
    high: float


def elasticities(rows: Rows, thresholds: Thresholds | None = None) -> list[Slope]:
    """The slope of log view error ratio over log images seen in the window that ends at each measurement after the start.

    The errors of the ratios are taken as independent, which is conservative: images and noise are the same at every step.
    """
    t = thresholds or Thresholds()
    high = dict(series(rows, "repr/view_error_ratio_high"))
    points = [(at, r) for at, r in series(rows, "repr/view_error_ratio") if at > 0 and r > 0]
    x, y = (np.array([math.log(point[i]) for point in points]) for i in (0, 1))
    half = np.array([math.log(high[at] / r) if at in high else 0.0 for at, r in points])
    found = []
    for end, (now, ratio) in enumerate(points):
        # The first measurement at or before the start of the window belongs to it: it is that long ago at least.
        start = max(0, int(np.searchsorted(x[end] - x[: end + 1] < math.log(t.window), True)) - 1)
        if end + 1 - start < t.fewest_points or x[end] - x[start] < 0.99 * math.log(t.window):
            continue
        inside = slice(start, end + 1)
        away = x[inside] - x[inside].mean()
        square = float(away @ away)
        slope = float(away @ y[inside]) / square
        reach = math.sqrt(float(((away * half[inside]) ** 2).sum())) / square
        found.append(Slope(now, points[start][0], ratio, float(half[end]), slope, slope - reach, slope + reach))
    return found


def _outgrows(slope: Slope, t: Thresholds) -> bool:
    """Whether the ratio grows faster than while a model learns what images share, as far as the estimate says."""
    return slope.value > t.elasticity and slope.ratio > t.smallest_ratio


def _ratio_turn(rows: Rows, t: Thresholds) -> _Evidence:
    """The turn that the view error ratio shows, and what it says now."""
    slopes = elasticities(rows, t)
    if not slopes:
        return _Evidence(None, "the view error ratio has too few measurements for its rate")
    now = slopes[-1]
    says = f"view error ratio grows with the power {now.value:.2f} ({now.low:.2f} to {now.high:.2f}) of images seen"
    sure = next(
        (i for i, s in enumerate(slopes) if s.low > t.elasticity and s.ratio > t.smallest_ratio * math.exp(s.reach)), None
    )
    if sure is None:
        says += f"; a turn is at more than {t.elasticity:g}, with a ratio of {t.smallest_ratio:g} or more"
        return _Evidence(None, says, True, doubtful=_outgrows(now, t))
    # Back from where it is sure to where the estimate crossed, and to the window before which it was surely below: the turn
    # that a slope shows is somewhere in its window.
    at = sure
    while at > 0 and _outgrows(slopes[at - 1], t):
        at -= 1
    low = at
    while low > 0 and slopes[low - 1].high > t.elasticity and slopes[low - 1].ratio > t.smallest_ratio:
        low -= 1
    evidence = f"view error ratio: from {slopes[at].images_seen:,} images seen on it grows faster than while learning"
    turn = _Turn(slopes[at].images_seen, slopes[low].since, slopes[sure].images_seen, evidence)
    far = series(rows, "repr/view_error_ratio")[-1][1] >= t.memorizing_ratio
    return _Evidence(turn, says, True, False, far)


def _certainty(rows: Rows, values: Sequence[tuple[int, float]], t: Thresholds) -> Callable[[int, int], bool]:
    """Whether a rise from one measurement to another is beyond doubt: by the best of the intervals that the history has."""
    paired = dict(series(rows, "repr/icr_rise_low"))
    low, high = dict(series(rows, "repr/icr_low")), dict(series(rows, "repr/icr_high"))
    places, value = {at: place for place, (at, _) in enumerate(values)}, dict(values)

    def certain(lowest_at: int, at: int) -> bool:
        if at in paired:
            return paired[at] > 0
        if lowest_at in high and at in low:
            return low[at] > high[lowest_at]
        # No intervals: only a rise that lasts is more than a wobble.
        last = values[max(0, places[at] - t.fewest_points + 1) : places[at] + 1]
        return len(last) == t.fewest_points and all(v - value[lowest_at] >= t.rise for _, v in last)

    return certain


def _icr_values(rows: Rows) -> tuple[str, list[tuple[int, float]]]:
    """What ICR is called where it is read for a turn, and its values after the start."""
    debiased = [(at, v) for at, v in series(rows, "repr/icr_debiased") if at > 0]
    if debiased:
        return "debiased ICR", debiased
    return "ICR (plug-in)", [(at, v) for at, v in series(rows, "repr/icr") if at > 0]


def _rise_turn(rows: Rows, t: Thresholds) -> _Evidence:
    """The turn that the rise of ICR shows, with both energies, and what it says now."""
    name, values = _icr_values(rows)
    if len(values) < 2 * t.fewest_points:
        return _Evidence(None, "ICR has too few measurements")
    certain = _certainty(rows, values, t)
    residual, invariant = dict(series(rows, "repr/trace_residual")), dict(series(rows, "repr/trace_invariant"))
    fisher = dict(series(rows, "repr/fisher_residual_energy"))

    def grown(energies: Mapping[int, float], start: int, end: int) -> float:
        return energies[end] / energies[start] if start in energies and end in energies and energies[start] > 0 else math.nan

    best_at, best = values[0]
    turn, doubtful, far = None, False, False
    for at, v in values:
        if v < best:
            best_at, best = at, v
        # A comparison with nan is false: energies that the history does not have do not object.
        outgrown = grown(residual, best_at, at) <= max(1.0, grown(invariant, best_at, at))
        enough = v - best >= t.rise and not outgrown
        doubtful = enough and not certain(best_at, at)
        far = v - best >= 2 * t.rise and not doubtful and not grown(fisher, best_at, at) < t.memorizing_growth
        if turn is None and enough and not doubtful:
            # The lowest value is only known up to the measurements that cannot be told from it.
            near = [a for a, w in values if a <= at and w - best < t.rise / 4]
            evidence = (
                f"{name} rose by {v - best:.3f} from its lowest, {best:.3f} at {best_at:,} images seen, and residual energy "
                "outgrew the invariant one"
            )
            turn = _Turn(best_at, min(near), max(near), evidence)
    rise = values[-1][1] - best
    says = f"{name} {values[-1][1]:.3f}, {rise:.3f} above its lowest ({best:.3f} at {best_at:,} images seen)"
    return _Evidence(turn, says, True, doubtful, far)


def verdict(history: Path | str | Iterable[Mapping[str, float]], thresholds: Thresholds | None = None) -> Verdict:
    """What a history says: an output folder, its `history.jsonl`, or rows `{"images_seen": ..., "repr/icr": ...}`.

    The state is that of the last row; a turn, once seen, stays. It is `undecided` where measurements are too few, or where
    evidence for a turn is there but not beyond doubt. Raises FileNotFoundError for a folder without a history,
    ValueError for a damaged one.
    """
    t = thresholds or Thresholds()
    rows = rows_of(history)
    found = (_ratio_turn(rows, t), _rise_turn(rows, t))
    steps = sorted({int(row["images_seen"]) for row in rows if any(key.startswith("repr/") for key in row)})
    says = tuple(evidence.says for evidence in found)
    turns = [evidence.turn for evidence in found if evidence.turn is not None]
    if not turns:
        sure = any(evidence.enough for evidence in found) and not any(evidence.doubtful for evidence in found)
        return Verdict(GENERALIZING if sure else UNDECIDED, None, None, None, says, steps[-1] if steps else None)
    first = min(turns, key=lambda turn: turn.at)
    state = MEMORIZING if any(evidence.far for evidence in found) else TURNING
    keep = max((step for step in steps if step <= first.at), default=steps[0])
    return Verdict(state, first.at, first.low, first.high, (*(turn.evidence for turn in turns), *says), keep)


def may_be_kept(history: Path | str | Iterable[Mapping[str, float]], thresholds: Thresholds | None = None) -> set[int]:
    """Images seen of all measurements so far that are, or may yet turn out to be, the one to keep.

    A turn is seen when it is past: it will have been where the ratio's rate left its range, if it has, or at the lowest ICR.
    Raises as `verdict` does.
    """
    t = thresholds or Thresholds()
    rows = rows_of(history)
    kept = verdict(rows, t).checkpoint_images_seen
    found = set() if kept is None else {kept}
    slopes = elasticities(rows, t)
    start = len(slopes)
    while start > 0 and _outgrows(slopes[start - 1], t):
        start -= 1
    if start < len(slopes):
        found.add(slopes[start].images_seen)
    _, values = _icr_values(rows)
    return found | ({min(values, key=lambda point: point[1])[0]} if values else set())
