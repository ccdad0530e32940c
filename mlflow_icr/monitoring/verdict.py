"""The verdict on a history: what the model does now, since when, how certain that is, and which checkpoint to keep.

`VerdictTracker().add(row)` takes one row in constant time; `verdict` reads a whole history. `evidence` has the rules.

| state | when |
|---|---|
| undecided | the error ratio is missing or was measured too seldom, or the evidence of a turn is not certain |
| generalizing | the ratio grows no faster than while learning, is not above its baseline, and samples hold no copies |
| turning | the ratio certainly grows faster or is above its baseline, and has not come back |
| memorizing | two detectors find copies among samples, and the run has turned or one of the two is a direct detector |

`docs/validation.md` says how often it was right on runs that no threshold was chosen on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow_icr.monitoring.evidence import (
    RATIOS,
    ExcessEvidence,
    Finding,
    RatioEvidence,
    RiseEvidence,
    Row,
    SampleEvidence,
    Strength,
    Thresholds,
    has_near_views_alone,
    without_ratios,
)
from mlflow_icr.monitoring.forecast import Forecast, Forecaster
from mlflow_icr.monitoring.series import rows_of

GENERALIZING, TURNING, MEMORIZING, UNDECIDED = "generalizing", "turning", "memorizing", "undecided"


@dataclass(frozen=True)
class Verdict:
    """The verdict at the last row of a history. Numbers are images seen.

    `state` holds since `since`. A turn is dated at `turned_at`, between `low` and `high`; it stays on record after it has
    cleared, at `cleared_at`. All are None where there was none. `checkpoint_images_seen` is the measurement to keep: the last
    one before a turn that holds, else the newest. `wants_samples`: a look at samples would decide.
    """

    state: str
    since: int | None = None
    turned_at: int | None = None
    low: int | None = None
    high: int | None = None
    cleared_at: int | None = None
    evidence: tuple[str, ...] = ()
    checkpoint_images_seen: int | None = None
    origin: int | None = None
    wants_samples: bool = False
    forecast: Forecast = field(default_factory=Forecast)

    @property
    def text(self) -> str:
        """The verdict in a few lines, Markdown."""
        since = "" if self.since is None else f" since {self.since:,} images seen"
        lines = [f"**{self.state}**{since}"]
        if self.turned_at is not None:
            cleared = "" if self.cleared_at is None else f", cleared at {self.cleared_at:,}"
            lines.append(f"turned at {self.turned_at:,} images seen ({self.low:,} to {self.high:,}){cleared}")
        lines += [*self.evidence, self.forecast.text]
        if self.checkpoint_images_seen is not None:
            lines.append(f"checkpoint to keep: {self.checkpoint_images_seen:,} images seen")
        return "\n\n".join(lines)

    def summary(self) -> dict[str, float]:
        """The numbers that a run table can be sorted by."""
        numbers = {
            "turned_at_images_seen": self.turned_at,
            "turned_at_images_seen_low": self.low,
            "turned_at_images_seen_high": self.high,
            "cleared_at_images_seen": self.cleared_at,
            "checkpoint_images_seen": self.checkpoint_images_seen,
        }
        return {key: float(value) for key, value in numbers.items() if value is not None} | self.forecast.values()


@dataclass(frozen=True)
class _Turn:
    """A turn and its bounds, all measurements; `cleared` is None while it holds."""

    at: int
    low: int
    high: int
    cleared: int | None = None

    @property
    def holds(self) -> bool:
        return self.cleared is None


class VerdictTracker:
    """The verdict on a growing history: `add` a row, in order of images seen, and get the verdict up to that row.

    One more row takes constant time, however long the history is.
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self._t = thresholds or Thresholds()
        self._ratio, self._rise, self._samples = RatioEvidence(self._t), RiseEvidence(self._t), SampleEvidence(self._t)
        self._excess = ExcessEvidence(self._t)
        self._forecaster = Forecaster()
        self._has_ratio, self._has_far = False, False
        self._turn: _Turn | None = None
        self._suspicion: tuple[int, int] | None = None  # the start of the present evidence of a turn, and its lower bound
        self._below = 0  # measurements in a row that are surely below the level at which a turn clears
        self._errors, self._copies = Finding(Strength.NOTHING, "nothing was measured"), Finding(Strength.NOTHING, "")
        self._rise_text = ""  # ICR's finding in words, besides that of the ratio
        self._first: int | None = None
        self.newest: int | None = None  # images seen of the last row
        self.verdict = Verdict(UNDECIDED)

    def add(self, row: Row) -> Verdict:
        """The verdict with one more row. Raises ValueError unless its images seen are more than the last row's."""
        at = int(row["images_seen"])
        if self.newest is not None and at <= self.newest:
            raise ValueError(f"images_seen is {at}; expected more than {self.newest}, the last row's")
        if any(key.startswith("repr/") for key in row):
            self._read_errors(row, at)
        return self._conclude(row, at)

    def add_samples(self, row: Row) -> Verdict:
        """The verdict with samples of the newest row, which was added without them. Raises ValueError for another row."""
        at = int(row["images_seen"])
        if at != self.newest:
            raise ValueError(f"images_seen is {at}; expected {self.newest}, the last row's")
        return self._conclude(row, at)

    def _read_errors(self, row: Row, at: int) -> None:
        """Take the ratio and ICR of a row, date a turn, and clear one."""
        self._first = at if self._first is None else self._first
        self._has_far |= RATIOS[0] in row
        near = not self._has_far and has_near_views_alone(row)
        self._has_ratio |= near or any(key in row for key in RATIOS)
        rise, (ratio, begins) = self._rise.add(row), self._ratio.add(without_ratios(row) if near else row)
        if near:
            ratio = self._excess.add(row)
        if begins:  # after a change of data, findings on the old data do not count
            self._turn, self._suspicion, self._below = None, None, 0
            self._samples, self._copies = SampleEvidence(self._t), Finding(Strength.NOTHING, "")
        self._forecaster.add(self._ratio, at, begins)
        # ICR alone convicts only where there is no ratio, and never acquits.
        self._errors, self._rise_text = (ratio, rise.text) if self._has_ratio else (rise, "")
        if self._errors.strength in (Strength.DOUBTFUL, Strength.CERTAIN):
            if self._suspicion is None:
                since = at if self._errors.since is None else self._errors.since
                self._suspicion = (at, since) if self._has_ratio else (since, since)
        elif self._errors.strength is not Strength.NOTHING:
            self._suspicion = None
        if self._errors.strength is Strength.CERTAIN and not (self._turn and self._turn.holds):
            assert self._suspicion is not None
            self._turn = _Turn(*self._suspicion, at)
        comes_back = (self._excess if near else self._ratio).below and self._errors.strength in (
            Strength.CLEAN,
            Strength.TOO_FEW,
        )
        self._below = self._below + 1 if comes_back and self._copies.strength is not Strength.CERTAIN else 0
        if self._turn and self._turn.holds and self._below >= self._t.fewest_points:
            self._turn = _Turn(self._turn.at, self._turn.low, self._turn.high, at)

    def _conclude(self, row: Row, at: int) -> Verdict:
        self.newest, last = at, self.verdict
        self._copies = self._samples.add(row)
        turned = self._turn is not None and self._turn.holds
        copies = self._copies.strength is Strength.CERTAIN and (turned or self._samples.is_direct)
        if copies and not turned:  # the errors gave no date: somewhere since the previous look
            before = self._samples.looks[0]
            self._turn, turned = _Turn(before, before, at), True
        acquitted = (
            self._errors.strength is Strength.CLEAN
            and self._has_ratio
            and self._copies.strength in (Strength.CLEAN, Strength.NOTHING)
        )
        state = MEMORIZING if copies else TURNING if turned else GENERALIZING if acquitted else UNDECIDED
        since = last.since if state == last.state and last.since is not None else at
        turn = self._turn
        evidence = [finding.text for finding in (self._errors, self._copies) if finding.text]
        if self._rise_text:
            evidence.insert(1, self._rise_text)
        self.verdict = Verdict(
            state,
            since,
            None if turn is None else turn.at,
            None if turn is None else turn.low,
            None if turn is None else turn.high,
            None if turn is None else turn.cleared,
            evidence=tuple(evidence),
            checkpoint_images_seen=turn.at if turn is not None and turned else self.newest,
            origin=self._ratio.clock.origin,
            wants_samples=turned or (state != GENERALIZING and self._errors.strength is not Strength.TOO_FEW),
            forecast=self._forecaster.forecast(turned, copies),
        )
        return self.verdict

    @property
    def may_be_kept(self) -> set[int]:
        """Images seen of the measurements so far that are, or may yet turn out to be, the one to keep.

        A turn is recognised afterwards: it is dated at the start of its evidence or, with copies alone, at the look before.
        """
        steps = {self.verdict.checkpoint_images_seen, *self._samples.looks[-1:]}
        if self._suspicion is not None:
            steps.add(self._suspicion[0])
        if not self._has_ratio and self._rise.best is not None:
            steps.add(int(self._rise.best["images_seen"]))
        return {at for at in steps if at is not None}


def folded(history: Path | str | Iterable[Mapping[str, float]], thresholds: Thresholds | None = None) -> VerdictTracker:
    """The tracker of an output folder's history, of a `history.jsonl`, or of rows; raises as `verdict` does.

    Rows may come in any order; of two with the same images seen the later one counts.
    """
    tracker = VerdictTracker(thresholds)
    rows = {int(row["images_seen"]): row for row in rows_of(history)}
    for at in sorted(rows):
        tracker.add(rows[at])
    return tracker


def verdict(history: Path | str | Iterable[Mapping[str, float]], thresholds: Thresholds | None = None) -> Verdict:
    """The verdict on a history: an output folder, its `history.jsonl`, or rows `{"images_seen": ..., "repr/icr": ...}`.

    Raises FileNotFoundError for a folder without a history, ValueError for a damaged one.
    """
    return folded(history, thresholds).verdict


def may_be_kept(history: Path | str | Iterable[Mapping[str, float]], thresholds: Thresholds | None = None) -> set[int]:
    """Images seen of all measurements so far that are, or may yet turn out to be, the one to keep. Raises as `verdict` does."""
    return folded(history, thresholds).may_be_kept
