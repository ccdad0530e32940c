"""The command `mlflow-icr report`: one page on a run, or on several."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, say


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "report", help="one self-contained HTML page on a run, or on the runs of a study or experiment"
    )
    parser.add_argument(
        "target", nargs="+", help="an output folder, a run's id, an experiment's name or id; several are compared"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the file (default: report.html)")
    parser.add_argument("--log", action="store_true", help="also upload it to the MLflow run, as report/index.html")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.reporting import report_command

    return report_command(arguments.target, arguments.output, log=arguments.log, say=say)
