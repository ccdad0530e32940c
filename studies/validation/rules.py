"""The rules that the validation study compares: each a score over a history, and an alarm where it passes a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlflow_icr.monitoring.series import Rows, series
from mlflow_icr.monitoring.verdict import GENERALIZING, UNDECIDED, Thresholds, elasticities, verdict

Score = list[tuple[int, float]]  # (images seen, score), the higher the more suspicious
MOST_FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class Outcome:
    """One run as the study sees it: its history, and from where on more than 5 % of its samples are copies (None: nowhere)."""

    name: str
    rows: Rows
    rich: bool
    onset: int | None


@dataclass(frozen=True)
class Rule:
    """A score with what it needs besides training images."""

    name: str
    score: Callable[[Rows], Score]
    heldout: bool = False


def _after_start(rows: Rows, key: str) -> Score:
    return [(at, value) for at, value in series(rows, key) if at > 0]


def _over_lowest(key: str, *, relative: bool) -> Callable[[Rows], Score]:
    """How far a value is above its lowest so far, the size of `curve past its minimum`."""

    def score(rows: Rows) -> Score:
        found, lowest = [], math.inf
        for at, value in _after_start(rows, key):
            lowest = min(lowest, value)
            found.append((at, value / lowest - 1 if relative else value - lowest))
        return found

    return score


def _elasticity(rows: Rows) -> Score:
    return [(slope.images_seen, slope.low) for slope in elasticities(rows)]


def _relative_gap(rows: Rows) -> Score:
    train = dict(series(rows, "loss/train_eval"))
    return [(at, value / train[at] - 1) for at, value in _after_start(rows, "loss/heldout") if train.get(at)]


RULES = (
    Rule("view error ratio, rate of growth", _elasticity),
    Rule("view error ratio, level", lambda rows: _after_start(rows, "repr/view_error_ratio")),
    Rule("ICR past its minimum (argmin)", _over_lowest("repr/icr", relative=False)),
    Rule("ICR, certain rise (lower bound, paired)", lambda rows: _after_start(rows, "repr/icr_rise_low")),
    Rule("Fisher residual energy over its lowest", _over_lowest("repr/fisher_residual_energy", relative=True)),
    Rule("Fisher residual energy, level", lambda rows: _after_start(rows, "repr/fisher_residual_energy")),
    Rule("Alignment over its lowest", _over_lowest("repr/alignment", relative=True)),
    Rule("Alignment, level", lambda rows: _after_start(rows, "repr/alignment")),
    Rule("RankMe over its lowest", _over_lowest("repr/rankme", relative=True)),
    Rule("RankMe, level", lambda rows: _after_start(rows, "repr/rankme")),
    Rule("train/held-out loss gap, relative", _relative_gap, heldout=True),
    Rule("held-out loss past its minimum", _over_lowest("loss/heldout", relative=True), heldout=True),
)


def alarm(score: Score, threshold: float) -> int | None:
    """Images seen at the first measurement whose score passes the threshold."""
    return next((at for at, value in score if value > threshold), None)


def verdict_alarm(rows: Rows, thresholds: Thresholds | None = None) -> int | None:
    """Images seen at the first measurement at which the verdict, on the history up to it, was `turning` or `memorizing`."""
    for end in range(1, len(rows) + 1):
        if verdict(rows[:end], thresholds).state not in (GENERALIZING, UNDECIDED):
            return int(rows[end - 1]["images_seen"])
    return None


@dataclass(frozen=True)
class Rates:
    """How a rule did: limited runs caught before their onset, rich ones accused, and the leads in images."""

    caught: int
    limited: int
    false_alarms: int
    rich: int
    leads: tuple[float, ...]  # onset less alarm, images seen, of the runs that were caught
    shares: tuple[float, ...]  # alarm over onset, of the same

    @property
    def caught_rate(self) -> float:
        """Of limited runs with an onset."""
        return self.caught / self.limited if self.limited else math.nan

    @property
    def false_alarm_rate(self) -> float:
        """Of rich runs."""
        return self.false_alarms / self.rich if self.rich else math.nan


def rates(outcomes: Sequence[Outcome], alarms: Mapping[str, int | None]) -> Rates:
    """Judge the alarms of some runs, by name. Limited runs without an onset are left out: there was nothing to catch."""
    limited = [o for o in outcomes if not o.rich and o.onset is not None]
    rich = [o for o in outcomes if o.rich]
    ahead = []
    for o in limited:
        at = alarms[o.name]
        if at is not None and o.onset is not None and at < o.onset:
            ahead.append((o.onset, at))
    return Rates(
        len(ahead),
        len(limited),
        sum(alarms[o.name] is not None for o in rich),
        len(rich),
        tuple(float(onset - at) for onset, at in ahead),
        tuple(at / onset for onset, at in ahead),
    )


def choose_threshold(score: Callable[[Rows], Score], outcomes: Sequence[Outcome]) -> float:
    """The threshold that catches most with at most 5 % false alarms; of an equally good range, its middle.

    Between the scores that occurred nothing changes, so those are all that need to be tried.
    """
    scores = {o.name: score(o.rows) for o in outcomes}
    values = sorted({value for found in scores.values() for _, value in found})
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    best: list[float] = []
    most = -1.0
    for threshold in middles:
        found = rates(outcomes, {name: alarm(points, threshold) for name, points in scores.items()})
        if found.false_alarm_rate > MOST_FALSE_ALARMS:
            continue
        if found.caught_rate > most:
            most, best = found.caught_rate, []
        if found.caught_rate == most:
            best.append(threshold)
    return (best[0] + best[-1]) / 2 if best else math.inf
