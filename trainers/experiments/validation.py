"""The validation study: how often a limited run is caught before it copies, and how often a rich one is accused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainers.arguments import OneLineParser
from trainers.experiments.validation_runs import all_runs, train_missing

RESULTS = Path(__file__).parents[2] / "docs" / "validation" / "runs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 1 when a run failed."""
    parser = OneLineParser(prog="validation", description=__doc__, allow_abbrev=False)
    parser.add_argument("--work-dir", default="outputs/validation", help="where runs are trained")
    parser.add_argument("--max-parallel", type=int, default=2)
    arguments = parser.parse_args(argv)
    failures = train_missing(all_runs(), Path(arguments.work_dir), RESULTS, arguments.max_parallel)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
