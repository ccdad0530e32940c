"""The command `mlflow-icr export-tensorboard`: MLflow runs as event files, once or continuously."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command, echo


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "export-tensorboard",
        "write MLflow runs as TensorBoard event files",
        "Write MLflow runs as TensorBoard event files. It may be killed and repeated: each point is written once.",
        "mlflow-icr export-tensorboard --experiment digits --logdir boards/ --follow",
    )
    which = parser.add_argument_group("which runs").add_mutually_exclusive_group(required=True)
    which.add_argument("--experiment", metavar="NAME", help="all runs of the experiment of this name")
    which.add_argument("--run-id", nargs="+", default=[], metavar="ID", help="these runs, and those nested in them")
    parser.add_argument(
        "--logdir", type=Path, required=True, metavar="DIR", help="the folder in which each run gets a folder of its own"
    )
    parser.add_argument("--follow", action="store_true", help="continue until no run is running; Ctrl-C ends it earlier")
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="SECONDS", help="with --follow: time between two reads; default: 5"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.bridge.run_export import Exported
    from mlflow_icr.bridge.tensorboard_export import export_runs

    printed: dict[str, str] = {}  # the status that was printed last, by run
    stopped = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        # Python ignores an interrupt where it cannot raise, such as in a destructor; the loop checks the event too.
        stopped.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)

    def on_run(run: Exported) -> None:
        if printed.get(run.run_id) != run.status or run.new_points or run.new_images:
            printed[run.run_id] = run.status
            print(f"{run.folder}: {run.new_points} points and {run.new_images} images added, {run.status}", flush=True)

    export_runs(
        arguments.logdir,
        experiment=arguments.experiment,
        run_ids=arguments.run_id,
        follow=arguments.follow,
        interval=arguments.interval,
        stop=stopped,
        on_run=on_run,
        echo=echo,
    )
    if stopped.is_set():
        raise KeyboardInterrupt
    print(f"look at them with: tensorboard --logdir {arguments.logdir}" if printed else "there are no runs yet")
    return 0
