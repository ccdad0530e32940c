"""The command `mlflow-icr import-tensorboard`: event files as MLflow runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command, echo


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "import-tensorboard",
        "write TensorBoard event files as MLflow runs",
        "Make an MLflow run of each folder with TensorBoard event files. It may be killed and repeated: only new points are "
        "added.",
        "mlflow-icr import-tensorboard boards/ --experiment digits",
    )
    parser.add_argument(
        "logdir", type=Path, metavar="LOGDIR", help="a folder; each folder in it that holds event files becomes a run"
    )
    parser.add_argument(
        "--experiment", required=True, metavar="NAME", help="the MLflow experiment; it is made if there is none"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.bridge.tensorboard_import import Imported, import_runs

    def on_run(run: Imported) -> None:
        print(f"{run.run_name}: {run.new_points} points and {run.new_images} images added, run {run.run_id}", flush=True)

    import_runs(arguments.logdir, arguments.experiment, on_run=on_run, echo=echo)
    return 0
