"""The command `mlflow-icr verdict`: whether a run generalizes, turns or memorizes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "verdict",
        "say whether a run generalizes, turns or memorizes",
        "Read the history of a run and print the verdict: generalizing, turning, memorizing or undecided. It says since when, "
        "why, and which checkpoint to keep.",
        "mlflow-icr verdict outputs/first",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output folder of a run, or its history.jsonl")
    parser.add_argument("--json", action="store_true", help="print all fields as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mlflow_icr.monitoring.verdict import verdict

    reached = verdict(arguments.folder)
    print(json.dumps(asdict(reached), indent=2) if arguments.json else reached.text.replace("**", "").replace("\n\n", "\n"))
    return 0
