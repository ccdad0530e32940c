"""The validation study: how often a limited run is caught before it copies, and how often a rich one is accused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.arguments import OneLineParser
from studies.validation import window as validation_window
from studies.validation.coverage import simulate_missing
from studies.validation.report import read_outcomes, write_report
from studies.validation.runs import all_runs, train_missing

DOCS = Path(__file__).parents[2] / "docs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 when a run failed."""
    parser = OneLineParser(prog="validation", description=__doc__, allow_abbrev=False)
    parser.add_argument("--work-dir", default="outputs/validation", help="where runs are trained")
    parser.add_argument("--max-parallel", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1000, help="draws of each simulation of the interval")
    parser.add_argument("--report-only", action="store_true", help="write docs/validation.md from the results there are")
    arguments = parser.parse_args(argv)
    results = DOCS / "validation" / "runs"
    failures = []
    if not arguments.report_only:
        failures = train_missing(all_runs(), Path(arguments.work_dir), results, arguments.max_parallel)
        if not validation_window.train_missing(DOCS, Path(arguments.work_dir)):
            failures.append("noise_window")
        simulate_missing(DOCS / "validation" / "coverage.csv", arguments.repeats)
    write_report(read_outcomes(results), all_runs(), DOCS)
    return 1 if failures else 0
