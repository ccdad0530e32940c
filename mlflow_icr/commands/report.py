"""The command `mlflow-icr report`: one page on a run, or on several."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command, echo


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "report",
        "write one HTML page on a run, or on several",
        "Write one HTML page with curves, samples, verdict and audit. Several runs are compared. The page needs no server.",
        "mlflow-icr report outputs/first --output first.html",
    )
    parser.add_argument(
        "target",
        nargs="+",
        metavar="TARGET",
        help="an output folder, a study's folder, the id of a run, or an experiment's name or id",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the file to write; default: report.html"
    )
    parser.add_argument("--log", action="store_true", help="upload it to the MLflow run too, as report/index.html")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.reporting import report_command

    return report_command(arguments.target, arguments.output, log=arguments.log, echo=echo)
