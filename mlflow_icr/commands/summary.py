"""The command `mlflow-icr summary`: a run's history in a few numbers, as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow_icr.commands.console import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("summary", help="lowest ICR, onset of copies and lead of a run's history, as JSON")
    parser.add_argument("folder", type=Path, help="an output folder, or its history.jsonl")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.monitoring.series import read_history
    from mlflow_icr.monitoring.summary import summarise

    print(json.dumps(summarise(read_history(arguments.folder)), indent=2))
    return 0
