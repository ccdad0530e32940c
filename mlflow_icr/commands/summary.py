"""The command `mlflow-icr summary`: a run's history in a few numbers, as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "summary",
        "print a run's lowest ICR, onset of copies and lead, as JSON",
        "Summarise the history of a run in a few numbers, as JSON: the lowest ICR, the onset of copies, and how long before "
        "that onset the turn was.",
        "mlflow-icr summary outputs/first",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output folder of a run, or its history.jsonl")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.monitoring.series import read_history
    from mlflow_icr.monitoring.summary import summarise

    print(json.dumps(summarise(read_history(arguments.folder)), indent=2))
    return 0
