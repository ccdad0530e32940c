"""The command `mlflow-icr import-tensorboard`: event files as MLflow runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, say


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("import-tensorboard", help="event files as MLflow runs; a repeat adds what is new")
    parser.add_argument("logdir", type=Path, help="a folder; each folder with event files in or below it is a run")
    parser.add_argument("--experiment", required=True, help="its name; made where there is none")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.bridge.tensorboard_import import Imported, import_runs

    def tell(run: Imported) -> None:
        print(f"{run.run_name}: {run.new_points} points and {run.new_images} images added, run {run.run_id}", flush=True)

    import_runs(arguments.logdir, arguments.experiment, tell=tell, say=say)
    return 0
