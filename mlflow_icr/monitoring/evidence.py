"""Evidence of copying from a history: from errors, ICR and samples. One more row takes constant time.

`RatioEvidence` reads an *error ratio* R, how much better the network denoises its training images than views of them that are
moved far (by 1/16 of the side): about 1 for a denoiser that cannot memorise photographs, and in slow growth where images have
an upright place, such as digits, and a network learns it. R speaks of memorizing by its *growth*, the elasticity
e = d log R / d log(images seen) over the last doubling, or by its *level* over the run's own baseline, the lowest R since the
origin. `RiseEvidence` reads ICR over its lowest value, `SampleEvidence` the detectors of copies.

The clock starts at the *origin*: the first row of the history (for a monitor that was attached late, or step 0 of a
fine-tuning), or the row where the data changed. After a change of batch size it counts optimizer steps, each as a batch of the
first size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

# The first one present is read. In histories from before far views existed, the second one was measured on crops, on about the
# scale of far views. Near views move by 1/128 of the side and the ratio by a few per cent only: `ExcessEvidence` reads them.
RATIOS = ("repr/far_error_ratio", "repr/view_error_ratio")
NEAR, EXCESS = "repr/near_error_ratio", "repr/view_excess"
NAMES = dict(zip((*RATIOS, EXCESS), ("far error ratio", "view error ratio", "view excess"), strict=True))
TRAIN_KEYS = ("train/optimizer_steps", "train/batch_size", "train/origin_images_seen")
Row = Mapping[str, float]


def ratio_key(rows: Iterable[Row]) -> str:
    """The key that the verdict reads: the far ratio, the excess where there are near views alone, or the older ratio."""
    keys = {key for row in rows for key in (*RATIOS, NEAR, EXCESS) if key in row}
    if RATIOS[0] not in keys and {NEAR, EXCESS} <= keys:
        return EXCESS
    return next((key for key in RATIOS if key in keys), RATIOS[0])


class Strength(Enum):
    """How strong one kind of evidence of copying is at a row."""

    NOTHING = "nothing"  # it was not measured
    TOO_FEW = "too few"  # it was, but too seldom to acquit
    CLEAN = "clean"
    DOUBTFUL = "doubtful"  # the estimate is beyond its threshold, its interval is not
    CERTAIN = "certain"


@dataclass(frozen=True)
class Thresholds:
    """Where evidence counts. `docs/validation.md` says how often the verdict is right with these."""

    # A ratio that grows faster than this power of images seen is turning: while a network learns what images share, the power
    # stays below 0.36 in every run kept that copies nothing, and passes 0.6 in those that do.
    elasticity: float = 0.5
    # Growth counts above this multiple of the baseline: lower ratios are within the differences that the views' pixels make.
    growth_level: float = 1.5
    # A ratio this far over its baseline convicts at any rate, and with fewer measurements than a rate needs.
    level: float = 5.0
    # At an unbiased ratio of this size the network knew its images before the first measurement.
    absolute_level: float = 6.0
    # A turn clears where the ratio is surely below this, relative to its baseline, for `fewest_points` measurements.
    clear_level: float = 1.5
    # The share of the way back to the image that denoised near views take. It creeps to 0.2 where images are upright and
    # nothing is copied, and is 0.3 to 0.6 where copies begin.
    excess: float = 0.25
    window: float = 2.0  # clock now over clock at the start of the rate's window: one doubling smooths a schedule's noise
    fewest_points: int = 3  # a slope of two points has no residual, and one measurement may be an accident
    # ICR creeps up in models that copy nothing, by 0.044 within 240 kimg: this is about twice that.
    rise: float = 0.1
    # Detectors of copies. Near-duplicates in a set and the noise of a few hundred samples account for up to 5 % of samples.
    copies: float = 0.05
    ct: float = -3.0  # a z-score (Meehan et al. 2020): samples nearer to training images than held-out ones are, certainly
    authentic: float = 25.0  # per cent of samples; of images that were not trained on about half are


@dataclass(frozen=True)
class Finding:
    """The finding of one kind of evidence at a row, as an enum and in words; `since` is the first row that it rests on."""

    strength: Strength
    text: str
    since: int | None = None


class Clock:
    """Images since the origin, in batches of the first size; constant where the batch is."""

    def __init__(self) -> None:
        self.value = 0.0
        self.origin: int | None = None  # images seen, where the clock is 0
        self._last: Row = {}
        self._first_batch: float | None = None

    def advance(self, row: Row) -> bool:
        """Advance to a row. Returns whether the clock restarts there."""
        batch = row.get("train/batch_size", self._last.get("train/batch_size"))
        moved = row.get("train/origin_images_seen", 0) != self._last.get("train/origin_images_seen", 0)
        # The trainers also move the origin when the batch size changes; network and data are the same then.
        begins = self.origin is None or (moved and batch == self._last.get("train/batch_size"))
        if begins:
            self.value, self.origin, self._first_batch = 0.0, int(row["images_seen"]), batch
        else:
            self.value += self._passed(self._last, row, batch)
        last = {key: row[key] for key in ("images_seen", *TRAIN_KEYS) if key in row}
        self._last = last if batch is None else last | {"train/batch_size": batch}
        return begins

    @property
    def images_per_unit(self) -> float:
        """Images seen for each unit of the clock: the batch size over the first batch size."""
        batch = self._last.get("train/batch_size")
        return batch / self._first_batch if batch and self._first_batch else 1.0

    def _passed(self, last: Row, row: Row, batch: float | None) -> float:
        images = row["images_seen"] - last["images_seen"]
        if not batch or not self._first_batch:
            return images
        steps, before = row.get("train/optimizer_steps"), last.get("train/optimizer_steps")
        if steps is None or before is None or steps <= before:
            return images * self._first_batch / batch
        return (steps - before) * self._first_batch


@dataclass(frozen=True)
class Slope:
    """The elasticity at a measurement, with bounds from the ratio's intervals; `since` is the start of its window."""

    images_seen: int
    since: int
    value: float
    low: float
    high: float


class SlopeWindow:
    """The least-squares slope of log ratio over log clock in the last doubling, by running sums over a queue.

    The errors of the ratios are taken as independent, which is conservative: images and noise are the same at every step.
    """

    def __init__(self, t: Thresholds) -> None:
        self._t = t
        self._points: deque[tuple[int, float, float, float]] = deque()  # images seen, log clock, log ratio, half-width
        self._sums = np.zeros(8)
        self._zero = 0.0  # subtracted from log clock, so that sums do not cancel

    def _terms(self, point: tuple[int, float, float, float]) -> np.ndarray:
        _, x, y, h = point
        x, h2 = x - self._zero, h * h
        return np.array([1.0, x, y, x * x, x * y, h2, h2 * x, h2 * x * x])

    def add(self, images_seen: int, clock: float, log_ratio: float, half_width: float) -> Slope | None:
        """The slope with one more point; None where there are too few, or they span less than the window."""
        if clock <= 0:
            return None
        points, t = self._points, self._t
        if not points:
            self._zero = math.log(clock)
        points.append((images_seen, math.log(clock), log_ratio, half_width))
        self._sums += self._terms(points[-1])
        now, span = points[-1][1], 0.99 * math.log(t.window)  # steps that round up to whole batches span a little less
        # The newest point that is a whole window old is kept as the first, and at least as many as a slope needs.
        while len(points) > t.fewest_points and now - points[1][1] >= span:
            self._sums -= self._terms(points.popleft())
        if len(points) < t.fewest_points or now - points[0][1] < span:
            return None
        n, x, y, xx, xy, hh, hhx, hhxx = self._sums.tolist()
        mean, square = x / n, xx - x * x / n
        slope = (xy - mean * y) / square
        reach = math.sqrt(max(0.0, hhxx - 2 * mean * hhx + mean * mean * hh)) / square
        return Slope(images_seen, points[0][0], slope, slope - reach, slope + reach)


class RatioEvidence:
    """The evidence of the error ratio: its growth, or its level over its lowest since the origin."""

    def __init__(self, t: Thresholds) -> None:
        self._t = t
        self.clock = Clock()
        self.key = RATIOS[-1]  # which ratio is read
        self.baseline = math.inf  # the lowest ratio since the origin
        self.relative: float | None = None  # the newest ratio over the baseline
        self.below = False  # whether it is surely so low that a turn clears
        self.slope: Slope | None = None
        self._window = SlopeWindow(t)
        self._before: int | None = None  # images seen, of the measurement before

    def add(self, row: Row) -> tuple[Finding, bool]:
        """The finding of the ratio with one more row, and whether the clock restarted there."""
        begins = self.clock.advance(row)
        key = next((key for key in RATIOS if key in row), self.key)
        if begins or RATIOS.index(key) < RATIOS.index(self.key):
            self.key, self.baseline, self._window = key, math.inf, SlopeWindow(self._t)
        self.below, at = False, int(row["images_seen"])
        ratio = row.get(self.key, math.nan)
        if not 0 < ratio < math.inf:
            return Finding(Strength.NOTHING, f"{self.key} is missing at {at:,} images seen"), begins
        low, high = (row.get(f"{self.key}_{end}", ratio) for end in ("low", "high"))
        self.baseline = min(self.baseline, ratio)
        self.relative = ratio / self.baseline
        self.slope = self._window.add(at, self.clock.value, math.log(ratio), max(0.0, math.log(high / ratio)))
        self.below = high / self.baseline < self._t.clear_level and ratio < self._t.absolute_level
        finding = self._finding(at, ratio, low)
        self._before = at
        return finding, begins

    def _finding(self, at: int, ratio: float, low: float) -> Finding:
        t, slope, since = self._t, self.slope, at if self._before is None else self._before
        text = f"{NAMES[self.key]} {ratio:.2f}, {ratio / self.baseline:.2f} times its lowest"
        if slope is None:
            text += "; too few measurements for its rate"
        else:
            text += f", growing with the power {slope.value:.2f} ({slope.low:.2f} to {slope.high:.2f}) of images seen"
        strength = Strength.TOO_FEW if slope is None else Strength.CLEAN
        for value, grade in ((ratio, Strength.DOUBTFUL), (low, Strength.CERTAIN)):
            if value > t.absolute_level or value > t.level * self.baseline:
                strength = grade
        if slope is not None and slope.value > t.elasticity and ratio > t.growth_level * self.baseline:
            since = min(since, slope.since)
            if slope.low > t.elasticity and low > t.growth_level * self.baseline:
                strength = Strength.CERTAIN
            elif strength is Strength.CLEAN:
                strength = Strength.DOUBTFUL
        return Finding(strength, text, since)


def has_near_views_alone(row: Row) -> bool:
    """Whether a row's ratio is one of near views, and there is none of far ones."""
    return RATIOS[0] not in row and (NEAR in row or (EXCESS in row and RATIOS[-1] not in row))


def without_ratios(row: Row) -> Row:
    """A row without the ratios that `RatioEvidence` reads."""
    return {key: value for key, value in row.items() if not key.startswith(RATIOS)}


class ExcessEvidence:
    """The evidence of near views, where there are no far ones: the share of the way back to the image that a network takes."""

    def __init__(self, t: Thresholds) -> None:
        self._t = t
        self.below = False  # whether it is surely so low that a turn clears
        self._count = 0
        self._since: int | None = None  # images seen, of the measurement before the share was passed

    def add(self, row: Row) -> Finding:
        """The finding of the excess with one more row."""
        t, at = self._t, int(row["images_seen"])
        value = row.get(EXCESS, math.nan)
        low, high = (row.get(f"{EXCESS}_{end}", value) for end in ("low", "high"))
        self.below = high < t.excess / 2
        if not math.isfinite(value):
            return Finding(Strength.NOTHING, f"{EXCESS} is missing at {at:,} images seen")
        self._count += 1
        since, self._since = self._since, at
        text = f"near views: {value:.0%} ({low:.0%} to {high:.0%}) of the way back to the image is taken"
        if value <= t.excess:
            return Finding(Strength.TOO_FEW if self._count <= t.fewest_points else Strength.CLEAN, text)
        return Finding(Strength.CERTAIN if low > t.excess else Strength.DOUBTFUL, text, at if since is None else since)


class RiseEvidence:
    """The evidence of ICR: its rise over its lowest value since training began, confirmed by both energies.

    It is never evidence against copying: ICR fell to the end in some runs that copied. `best` is the row where it is lowest.
    """

    def __init__(self, t: Thresholds) -> None:
        self._t = t
        self._key, self._name = "repr/icr", "ICR (plug-in)"
        self._clear()

    def _clear(self) -> None:
        self.best: Row | None = None
        self._lowest, self._count = math.inf, 0
        self._last: deque[float] = deque(maxlen=self._t.fewest_points)

    def add(self, row: Row) -> Finding:
        """The finding of ICR with one more row."""
        at = int(row["images_seen"])
        if "repr/icr_debiased" in row and self._key == "repr/icr":  # what came before is on another scale
            self._key, self._name = "repr/icr_debiased", "debiased ICR"
            self._clear()
        value = row.get(self._key, math.nan)
        if at == 0 or not math.isfinite(value):
            return Finding(Strength.NOTHING, f"{self._key} is missing at {at:,} images seen")
        self._count += 1
        self._last.append(value)
        if value < self._lowest:
            self._lowest, self.best = value, {k: row[k] for k in RISE_KEYS if k in row}
        assert self.best is not None
        lowest_at, rise = int(self.best["images_seen"]), value - self._lowest
        text = f"{self._name} {value:.3f}, {rise:.3f} above its lowest ({self._lowest:.3f} at {lowest_at:,} images seen)"
        if self._count < 2 * self._t.fewest_points:
            return Finding(Strength.TOO_FEW, text)
        if rise < self._t.rise or self._invariant_keeps_up(row):
            return Finding(Strength.CLEAN, text)
        return Finding(Strength.CERTAIN if self._is_certain(row) else Strength.DOUBTFUL, text, lowest_at)

    def _invariant_keeps_up(self, row: Row) -> bool:
        """Whether the invariant energy grew as much as the residual energy: then views share what was learned."""
        assert self.best is not None
        residual, invariant = (_growth(self.best, row, f"repr/trace_{part}") for part in ("residual", "invariant"))
        # A comparison with nan is false: missing energies do not count against a rise.
        return residual <= max(1.0, invariant)

    def _is_certain(self, row: Row) -> bool:
        """Whether the rise is certain, by the best interval in the history; without intervals, by how long it lasts."""
        assert self.best is not None
        if "repr/icr_rise_low" in row:
            return row["repr/icr_rise_low"] > 0
        if "repr/icr_high" in self.best and "repr/icr_low" in row:
            return row["repr/icr_low"] > self.best["repr/icr_high"]
        return len(self._last) == self._t.fewest_points and all(v - self._lowest >= self._t.rise for v in self._last)


RISE_KEYS = ("images_seen", "repr/icr_high", "repr/trace_residual", "repr/trace_invariant")


def _growth(before: Row, now: Row, key: str) -> float:
    return now[key] / before[key] if key in now and before.get(key, 0) > 0 else math.nan


class SampleEvidence:
    """The finding of the copy detectors on the newest samples.

    Two must agree. The distance ratio and the copy similarity are direct: they need one training image to be much nearer than
    others. C_T and authenticity are also low where samples are merely smooth, as those of a network that has learned little.
    """

    def __init__(self, t: Thresholds) -> None:
        self._t = t
        self.looks: tuple[int, ...] = ()  # images seen of the newest look, and of the one before
        self.agree: tuple[str, ...] = ()  # the detectors that say copies
        self.is_direct = False
        self._text = ""

    def add(self, row: Row) -> Finding:
        """The finding of samples with one more row; a row without samples leaves the newest finding."""
        measured = [(name, is_copy, text) for name, is_copy, text in self._detectors(row) if text]
        if measured:
            at = int(row["images_seen"])
            self.looks = (*self.looks[-1:], at)
            self.agree = tuple(name for name, is_copy, _ in measured if is_copy)
            self.is_direct = bool(set(self.agree) - {"C_T", "authenticity"})
            names = f" ({', '.join(self.agree)})" if self.agree else ""
            count = f"{len(self.agree)} of {len(measured)} detectors say copies{names}"
            self._text = f"samples at {at:,} images seen: {count}: {', '.join(text for _, _, text in measured)}"
        if not self.looks:
            return Finding(Strength.NOTHING, "no samples were compared with training images")
        strength = (Strength.CLEAN, Strength.DOUBTFUL, Strength.CERTAIN)[min(2, len(self.agree))]
        return Finding(strength, self._text, self.looks[0])

    def _detectors(self, row: Row) -> Iterator[tuple[str, bool, str]]:
        """Each detector's name, whether it finds copies, and its value in words; the words are empty if it was not measured."""
        t = self._t
        ratio = row.get("mem/ratio_l2", math.nan)
        yield "distance ratio", ratio > t.copies, _shown(ratio, "{:.1%} much nearer to one training image than to others")
        for key in (key for key in row if key.startswith("mem/copies_") and not key.endswith(("_train", "_low", "_high"))):
            excess = row[key] - row.get(f"{key}_train", 0.0)
            name = f"similarity, {key.removeprefix('mem/copies_')}"
            yield name, excess > t.copies, _shown(row[key], "{:.1%} too similar to one")
        ct = row.get("mem/ct", math.nan)
        yield "C_T", ct < t.ct, _shown(ct, "C_T {:.1f}")
        authentic = row.get("mem/authpct", math.nan)
        yield "authenticity", authentic < t.authentic, _shown(authentic, "{:.0f} % authentic")


def _shown(value: float, words: str) -> str:
    return words.format(value) if math.isfinite(value) else ""
