"""The validation study: how often a limited run is caught before it copies, and how often a rich one is accused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlflow_icr.arguments import OneLineParser
from studies.validation import window as validation_window
from studies.validation.calibration import main as calibrate
from studies.validation.coverage import simulate_missing
from studies.validation.report import write_report
from studies.validation.results import read_results
from studies.validation.runs import RESULTS, read_plan, select, train_missing

DOCS = Path(__file__).parents[2] / "docs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 when a run failed."""
    parser = OneLineParser(prog="validation", description=__doc__, allow_abbrev=False)
    parser.add_argument("--work-dir", type=Path, default=Path("outputs/validation"), help="where runs are trained")
    parser.add_argument("--results-dir", type=Path, default=RESULTS, help="where results are kept")
    parser.add_argument("--max-parallel", type=int, default=2)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="train this run alone; repeatable")
    parser.add_argument("--repeats", type=int, default=1000, help="draws of each simulation of the interval")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--train-only", action="store_true", help="train runs, simulate and write nothing")
    which.add_argument("--report-only", action="store_true", help="write docs/validation.md from the results that exist")
    arguments = parser.parse_args(argv)
    failures, plan = [], read_plan()
    if not arguments.report_only:
        chosen = select(plan, arguments.only) if arguments.only else plan
        failures = train_missing(chosen, arguments.work_dir, arguments.results_dir, arguments.max_parallel)
        if arguments.train_only:
            return 1 if failures else 0
        if not validation_window.train_missing(DOCS, arguments.work_dir):
            failures.append("noise_window")
        simulate_missing(DOCS / "validation" / "coverage.csv", arguments.repeats)
    calibrate([])
    write_report(read_results(arguments.results_dir), plan, DOCS)
    return 1 if failures else 0
