"""The command `mlflow-icr best-checkpoint`: the checkpoint to keep, fetched."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command, echo


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "best-checkpoint",
        "fetch the checkpoint to keep, as a diffusers folder",
        "Find the checkpoint that the verdict keeps, or the one with the best value of a metric. Print its folder, or copy it.",
        "mlflow-icr best-checkpoint outputs/first --output best",
    )
    parser.add_argument("run_or_folder", metavar="RUN", help="the output folder of a run, or the id of an MLflow run")
    parser.add_argument(
        "--metric",
        metavar="KEY",
        help="take the checkpoint with the lowest value of this metric, such as repr/icr; default: the verdict's",
    )
    parser.add_argument("--max", action="store_true", help="with --metric: take the highest value instead")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="copy it to this new folder; default: leave it there, or download to a temporary folder",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.tracking.checkpoints.best import check_output, choose, fetch

    check_output(arguments.output)
    if arguments.max and arguments.metric is None:
        raise ValueError("max is given without metric; expected --metric KEY, whose highest value is taken")
    choice = choose(arguments.run_or_folder, metric=arguments.metric, maximum=arguments.max)
    echo(choice.why)
    print(fetch(choice, arguments.output))
    return 0
