"""The rules that the study compares: each a score over a history, and an alarm where it passes a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlflow_icr.monitoring.series import Rows, series
from studies.validation.outcomes import Outcome

Score = list[tuple[int, float]]  # (images seen, score), the higher the more suspicious
MOST_FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class Rule:
    """A score, and whether it needs held-out images beside training images.

    `threshold` is given where a rule has its own, otherwise it is chosen; a rule that is `either_way` has its sign chosen too,
    as its direction is unknown.
    """

    name: str
    score: Callable[[Outcome], Score]
    heldout: bool = False
    either_way: bool = False
    threshold: float | None = None


def _after_start(rows: Rows, key: str) -> Score:
    return [(at, value) for at, value in series(rows, key) if at > 0]


def level(key: str) -> Callable[[Outcome], Score]:
    """The score that is a logged value itself."""
    return lambda outcome: _after_start(outcome.rows, key)


def over_lowest(key: str, *, relative: bool) -> Callable[[Outcome], Score]:
    """How far a value is above its lowest so far, the size of `curve past its minimum`."""

    def score(outcome: Outcome) -> Score:
        points, lowest = [], math.inf
        for at, value in _after_start(outcome.rows, key):
            lowest = min(lowest, value)
            points.append((at, value / lowest - 1 if relative else value - lowest))
        return points

    return score


def epochs(outcome: Outcome) -> Score:
    """How often each training image was seen."""
    return [(int(row["images_seen"]), row["images_seen"] / outcome.num_images) for row in outcome.rows if row["images_seen"]]


def log_gap(outcome: Outcome) -> Score:
    """The logarithm of held-out over training loss."""
    train = dict(series(outcome.rows, "loss/train_eval"))
    heldout = _after_start(outcome.rows, "loss/heldout")
    return [(at, math.log(value / train[at])) for at, value in heldout if train.get(at, 0) > 0 and value > 0]


def negative(score: Callable[[Outcome], Score]) -> Callable[[Outcome], Score]:
    """The score with the opposite sign."""
    return lambda outcome: [(at, -value) for at, value in score(outcome)]


def alarm(score: Score, threshold: float) -> int | None:
    """Images seen at the first measurement whose score passes the threshold."""
    return next((at for at, value in score if value > threshold), None)


@dataclass(frozen=True)
class Rates:
    """A rule's results by one detector's onsets: copying runs caught ahead, and clean ones accused.

    An alarm in a clean run is false if the run went on to `open_factor` times the images seen at the alarm, without a copy;
    else it is `open`: whether copies would have come is not known.
    """

    caught: int
    copying: int
    false_alarms: int
    open: int
    clean: int
    shares: tuple[float, ...]  # images seen at the alarm over those at the onset, of the runs that were caught

    @property
    def caught_rate(self) -> float:
        """The share of copying runs that were caught."""
        return self.caught / self.copying if self.copying else math.nan

    @property
    def false_alarm_rate(self) -> float:
        """The share of clean runs that were accused, without those whose alarm is open."""
        judged = self.clean - self.open
        return self.false_alarms / judged if judged else math.nan


def rates(outcomes: Sequence[Outcome], alarms: Mapping[str, int | None], detector: str, open_factor: float) -> Rates:
    """Judge the alarms of some runs, by name. Runs in which only other detectors find copies are left out."""
    shares, copying, false, undecided, clean = [], 0, 0, 0, 0
    for o in outcomes:
        at, onset = alarms[o.name], o.onsets.get(detector)
        if onset is not None:
            copying += 1
            if at is not None and at < onset:
                shares.append(at / onset)
        elif o.clean:
            clean += 1
            false += at is not None and o.end >= open_factor * at
            undecided += at is not None and o.end < open_factor * at
    return Rates(len(shares), copying, false, undecided, clean, tuple(shares))


def choose_threshold(
    score: Callable[[Outcome], Score], outcomes: Sequence[Outcome], detector: str, open_factor: float
) -> tuple[float, float]:
    """The threshold that catches most with at most 5 % false alarms, and the share it catches; the middle of an equal range.

    Nothing changes between two neighbouring scores that occurred, so only their midpoints are tried, all of them at once.
    """
    scores = [score(o) for o in outcomes]
    values = np.unique([value for points in scores for _, value in points if math.isfinite(value)])
    thresholds = (values[1:] + values[:-1]) / 2
    caught, copying, false, undecided, clean = np.zeros(len(thresholds)), 0, np.zeros(len(thresholds)), 0.0, 0
    for o, points in zip(outcomes, scores, strict=True):
        at, onset = _alarms(points, thresholds), o.onsets.get(detector)
        if onset is not None:
            copying += 1
            caught += at < onset
        elif o.clean:
            clean += 1
            false += o.end >= open_factor * at
            undecided += np.isfinite(at) & (o.end < open_factor * at)
    judged = clean - undecided
    allowed = false <= MOST_FALSE_ALARMS * judged
    if not copying or not allowed.any():
        return math.inf, 0.0
    most = caught[allowed].max()
    best = thresholds[allowed & (caught == most)]
    return float(best[0] + best[-1]) / 2, float(most) / copying


def _alarms(points: Score, thresholds: np.ndarray) -> np.ndarray:
    """Images seen at `alarm` for each threshold; infinity for none."""
    records = [(-math.inf, math.inf)]  # values that are higher than all before, and the images seen there
    for at, value in points:
        if value > records[-1][0]:
            records.append((value, at))
    highest, places = np.array(records[1:]).reshape(-1, 2).T
    return np.append(places, math.inf)[np.searchsorted(highest, thresholds, side="right")]


def with_threshold(rule: Rule, outcomes: Sequence[Outcome], detector: str, open_factor: float) -> Rule:
    """The rule with its own threshold, or with a threshold, and a sign if it is `either_way`, chosen on some runs."""
    if rule.threshold is not None:
        return rule
    threshold, caught = choose_threshold(rule.score, outcomes, detector, open_factor)
    if rule.either_way:
        negated = negative(rule.score)
        other, caught_too = choose_threshold(negated, outcomes, detector, open_factor)
        if caught_too > caught:
            return replace(rule, score=negated, threshold=other, name=f"{rule.name}, falling")
    return replace(rule, threshold=threshold)


def alarms_of(rule: Rule, outcomes: Sequence[Outcome]) -> dict[str, int | None]:
    """Images seen at the alarm of a rule that has its threshold, by run; None for no alarm."""
    assert rule.threshold is not None
    return {o.name: alarm(rule.score(o), rule.threshold) for o in outcomes}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of runs at one horizon: which are comparable, and which of those the score has right; (n, n), 1, 0 or a half."""

    runs: np.ndarray  # (n,) places in the list of outcomes
    comparable: np.ndarray
    right: np.ndarray


def value_at(score: Score, images_seen: float) -> float:
    """A score at some images seen, between its measurements on the straight line; nan outside of them."""
    at, values = np.array(score, dtype=float).reshape(-1, 2).T
    return float(np.interp(images_seen, at, values, left=math.nan, right=math.nan)) if len(at) else math.nan


def pairs_at(score: Callable[[Outcome], Score], outcomes: Sequence[Outcome], detector: str, epochs_seen: float) -> Pairs:
    """All pairs of runs that have copied nothing by so many epochs: one copies at an epoch that the other is seen to pass.

    Harrell's concordance (1982): a run without an onset is censored at its end. A pair is right if the run that copies sooner
    has the higher score at the horizon, and half right if they are equal.
    """
    runs, scores, times, copies = [], [], [], []
    for place, o in enumerate(outcomes):
        onset, seen = o.onsets.get(detector), epochs_seen * o.num_images
        if seen > o.end or (onset is not None and onset <= seen) or (onset is None and not o.clean):
            continue
        value = value_at(score(o), seen)
        if math.isfinite(value):
            runs.append(place)
            scores.append(value)
            times.append((o.end if onset is None else onset) / o.num_images)
            copies.append(onset is not None)
    s, t, c = np.array(scores), np.array(times), np.array(copies, dtype=bool)
    comparable = c[:, None] & ((t[:, None] < t[None]) | ((t[:, None] == t[None]) & ~c[None]))
    equal = np.isclose(s[:, None], s[None], rtol=1e-9, atol=0)  # rounding is no difference
    right = np.where(equal, 0.5, (s[:, None] > s[None]).astype(float))
    return Pairs(np.array(runs, dtype=int), comparable.astype(float), right * comparable)


@dataclass(frozen=True)
class Concordance:
    """The share of comparable pairs that a score has right, with a bootstrap interval over runs, and how many pairs."""

    value: float
    low: float
    high: float
    pairs: int


def concordance(
    score: Callable[[Outcome], Score], outcomes: Sequence[Outcome], detector: str, horizons: Sequence[float], draws: int = 500
) -> Concordance:
    """Harrell's concordance of a score with the epoch of onset, over all horizons together."""
    tables = [pairs_at(score, outcomes, detector, epochs_seen) for epochs_seen in horizons]

    def share(weights: np.ndarray) -> float:
        right = sum(float(weights[p.runs] @ p.right @ weights[p.runs]) for p in tables)
        total = sum(float(weights[p.runs] @ p.comparable @ weights[p.runs]) for p in tables)
        return right / total if total else math.nan

    count = len(outcomes)
    rng = np.random.default_rng(0)
    drawn = [share(rng.multinomial(count, np.full(count, 1 / count)).astype(float)) for _ in range(draws if count else 0)]
    finite = [value for value in drawn if math.isfinite(value)]
    low, high = np.quantile(finite, (0.025, 0.975)) if finite else (math.nan, math.nan)
    return Concordance(share(np.ones(count)), float(low), float(high), int(sum(p.comparable.sum() for p in tables)))
