"""The table of the forecast: how much later copies came than the error ratio passed a multiple of its baseline.

`python -m studies.validation.calibration` writes `mlflow_icr/monitoring/forecast.json` from the results of the half on which
thresholds are chosen, and from older histories. Nothing of the other half is read.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_icr.arguments import OneLineParser
from mlflow_icr.monitoring.evidence import RatioEvidence, Thresholds
from mlflow_icr.monitoring.forecast import TABLE, Forecaster, Level, table_text
from mlflow_icr.monitoring.series import Rows, read_history
from studies.validation.outcomes import LEADING, lasting_onset, onsets_of
from studies.validation.results import read_results
from studies.validation.runs import read_plan

LEVELS = (2.0, 3.0, 4.0, 6.0, 8.0)
SHARE = 0.8
FEWEST_RUNS = 6  # a median of fewer is one run's
ROOT = Path(__file__).parents[2]
RESULTS, HISTORIES = ROOT / "docs" / "validation" / "results", ROOT / "docs" / "validation" / "runs"


def log_factor(rows: Rows, level: float, onset: int) -> float | None:
    """log of the clock at the onset over that at the passing of a level; None where it was not passed before."""
    ratio, forecaster = RatioEvidence(Thresholds()), Forecaster((SHARE, [Level(level, 1, 1, 1, 0)]))
    for row in rows:
        _, begins = ratio.add(row)
        forecaster.add(ratio, int(row["images_seen"]), begins)
        if row["images_seen"] >= onset:
            break
    passed, at_onset = forecaster.passed_at, ratio.clock.value
    return math.log(at_onset / passed) if passed is not None and 0 < passed < at_onset else None


def calibrated(level: float, factors: Mapping[str, Sequence[float]], share: float = SHARE) -> Level | None:
    """A row of the table from the log factors of runs, by data set; None for too few.

    The centre is the median over all. A run's residual is from the median over the *other* data sets, so that the interval is
    as wide as for images that were not tried: its half-width is the ceil((n + 1) share)-th smallest of n (Vovk et al. 2005).
    """
    all_logs = [value for values in factors.values() for value in values]
    if len(all_logs) < FEWEST_RUNS or sum(map(bool, factors.values())) < 2:
        return None
    residuals = []
    for name, values in factors.items():
        centre = statistics.median([value for other, others in factors.items() if other != name for value in others])
        residuals += [abs(value - centre) for value in values]
    rank = math.ceil((len(residuals) + 1) * share)
    if rank > len(residuals):
        return None
    half, centre = sorted(residuals)[rank - 1], statistics.median(all_logs)
    low, middle, high = (float(f"{math.exp(value):.4g}") for value in (centre - half, centre, centre + half))
    return Level(level, middle, max(1.0, low), high, len(all_logs))


def copying_runs(results: Path, histories: Path) -> Iterable[tuple[str, str, Rows, int]]:
    """Name, data set, rows and onset of the runs that copy, by the leading detector: chosen-on results, and older histories."""
    plan = read_plan()
    half = {run.name for run in plan.runs if run.chosen_on}
    for result in read_results(results):
        if result.name in half:
            onset = onsets_of(result.rows, plan.truth).get(LEADING)
            if onset is not None:
                yield result.name, str(result.factors["images"]).rstrip("0123456789"), result.rows, onset
    for folder in sorted(histories.glob("*-limited-*")):
        rows = read_history(folder)
        onset = lasting_onset(rows, **plan.truth[LEADING])
        if onset is not None:
            name = folder.name.split("-limited-")[0]
            yield folder.name, {"mnist5k": "mnist", "fashion-mnist": "fashion"}.get(name, name), rows, onset


def factors_of(name: str, images: str, rows: Rows, onset: int) -> dict[str, Any]:
    """The table's entry of a run: its factors, onset over passing, by level."""
    logs = {f"{level:g}": log_factor(rows, level, onset) for level in LEVELS}
    factors = {level: float(f"{math.exp(log):.4g}") for level, log in logs.items() if log is not None}
    return {"run": name, "images": images, "factors": factors}


def levels_of(runs: Sequence[Mapping[str, Any]]) -> list[Level]:
    """The rows of the table that follow from runs' factors."""
    levels = []
    for level in LEVELS:
        logs: dict[str, list[float]] = {run["images"]: [] for run in runs}
        for run in runs:
            if f"{level:g}" in run["factors"]:
                logs[run["images"]].append(math.log(run["factors"][f"{level:g}"]))
        row = calibrated(level, logs)
        if row is not None:
            levels.append(row)
    return levels


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = OneLineParser(prog="validation.calibration", description=__doc__, allow_abbrev=False)
    parser.add_argument("--results-dir", type=Path, default=RESULTS)
    parser.add_argument("--histories", type=Path, default=HISTORIES, help="output folders of older runs")
    parser.add_argument("--output", type=Path, default=TABLE)
    arguments = parser.parse_args(argv)
    runs = [factors_of(*run) for run in copying_runs(arguments.results_dir, arguments.histories)]
    arguments.output.write_text(table_text(SHARE, levels_of(runs), runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
