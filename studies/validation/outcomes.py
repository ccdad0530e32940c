"""The outcome of each run: the onset of copies by each detector, and how far the run went."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_icr.monitoring.series import Rows, series
from studies.validation.results import Result
from studies.validation.runs import Plan

LEADING = "distance ratio"
TWO = "two detectors"


@dataclass(frozen=True)
class Outcome:
    """One run as the study sees it; `onsets` has the images seen, or None, for each detector that was measured."""

    name: str
    factors: Mapping[str, Any]
    chosen_on: bool
    rows: Rows
    onsets: Mapping[str, int | None]

    @property
    def num_images(self) -> int:
        """N, training images."""
        return int(self.factors["num_images"])

    @property
    def end(self) -> int:
        """Images seen at the last measurement."""
        return int(self.rows[-1]["images_seen"])

    @property
    def images(self) -> str:
        """The set, whatever its size in pixels."""
        return str(self.factors["images"]).rstrip("0123456789")

    @property
    def clean(self) -> bool:
        """Whether no detector found a copy that lasted."""
        return not any(at is not None for at in self.onsets.values())


def lasting_onset(rows: Rows, key: str, *, above: float | None = None, below: float | None = None) -> int | None:
    """Images seen at the first measurement from which on a value stays beyond its threshold to the end; None for never."""
    onset = None
    for at, value in reversed(series(rows, key)):
        if not ((above is not None and value > above) or (below is not None and value < below)):
            break
        onset = at
    return onset


def onsets_of(rows: Rows, truth: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """The onset by each detector whose key the rows have, and the second of these onsets."""
    onsets = {name: lasting_onset(rows, **rule) for name, rule in truth.items() if series(rows, rule["key"])}
    later = sorted(at for at in onsets.values() if at is not None)
    return onsets | {TWO: later[1] if len(later) > 1 else None}


def outcome_of(result: Result, plan: Plan) -> Outcome:
    """The outcome of a run. Raises ValueError for one that is not in the plan."""
    half = {run.name: run.chosen_on for run in plan.runs}
    if result.name not in half:
        raise ValueError(f"result is of {result.name!r}, which the plan does not have")
    return Outcome(result.name, result.factors, half[result.name], result.rows, onsets_of(result.rows, plan.truth))


def agreement(outcomes: Sequence[Outcome], first: str, second: str) -> list[int]:
    """Runs in which both detectors find copies, the first alone, the second alone, and neither: four numbers."""
    pairs = [
        (o.onsets[first] is not None, o.onsets[second] is not None) for o in outcomes if {first, second} <= o.onsets.keys()
    ]
    return [pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]


def write_outcomes(path: Path, outcomes: Sequence[Outcome], alarms: Mapping[str, Mapping[str, int | None]]) -> None:
    """A table with a line for each run: factors, each detector's onset, and where each rule's alarm was, in images seen."""
    factors = sorted({key for o in outcomes for key in o.factors})
    detectors = sorted({key for o in outcomes for key in o.onsets})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = [*factors, "end", *(f"copies by {d}" for d in detectors), *(f"alarm of {rule}" for rule in alarms)]
        writer.writerow(["run", "chosen_on", *columns])
        for o in outcomes:
            numbers = [o.onsets.get(d) for d in detectors] + [rule_alarms.get(o.name) for rule_alarms in alarms.values()]
            cells = [o.factors.get(key, "") for key in factors] + [o.end, *("" if n is None else n for n in numbers)]
            writer.writerow([o.name, int(o.chosen_on), *cells])
