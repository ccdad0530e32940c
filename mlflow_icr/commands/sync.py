"""The command `mlflow-icr sync`: deliver to MLflow what it missed."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "sync",
        "deliver to MLflow what it missed of a run or study",
        "Deliver to MLflow what it missed of a run or study, after an outage or a kill. Nothing is delivered twice.",
        "mlflow-icr sync outputs/first",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output folder of a run, or a folder above several")
    parser.add_argument("--dry-run", action="store_true", help="only print what has not been delivered")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="the server's new address, if it has moved; default: the run's first address"
    )
    parser.add_argument("--new-run", action="store_true", help="send everything to a new run, there or at MLFLOW_TRACKING_URI")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.tracking.mlflow.sync import sync

    deliveries = sync(
        arguments.folder,
        new_run=arguments.new_run,
        tracking_uri=arguments.tracking_uri,
        dry_run=arguments.dry_run,
        echo=lambda text: print(text, flush=True),
    )
    return 0 if all(delivery.complete for delivery in deliveries) else 1
