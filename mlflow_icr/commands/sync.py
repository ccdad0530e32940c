"""The command `mlflow-icr sync`: what MLflow missed is delivered to it."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("sync", help="deliver to MLflow what it missed of a run or study; a repeat adds nothing twice")
    parser.add_argument("folder", type=Path, help="an output folder, or one above several")
    parser.add_argument("--dry-run", action="store_true", help="only say what waits for what")
    parser.add_argument("--tracking-uri", help="where the run's server is now; default: where it was when the run began")
    parser.add_argument("--new-run", action="store_true", help="everything to a new run, there or at MLFLOW_TRACKING_URI")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.tracking.mlflow.sync import sync

    found = sync(
        arguments.folder,
        new_run=arguments.new_run,
        tracking_uri=arguments.tracking_uri,
        dry_run=arguments.dry_run,
        say=lambda text: print(text, flush=True),
    )
    return 0 if all(part.complete for part in found) else 1
