"""The command `mlflow-icr verdict`: what a run's history says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow_icr.commands.console import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("verdict", help="what a run's history says: generalizing, turning, memorizing or undecided")
    parser.add_argument("folder", type=Path, help="an output folder, or its history.jsonl")
    parser.add_argument("--json", action="store_true", help="all fields, as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mlflow_icr.monitoring.verdict import verdict

    found = verdict(arguments.folder)
    print(json.dumps(asdict(found), indent=2) if arguments.json else found.text.replace("**", "").replace("\n\n", "\n"))
    return 0
