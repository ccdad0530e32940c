"""The command `mlflow-icr best-checkpoint`: the checkpoint to keep, fetched."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlflow_icr.commands.console import Commands, say


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("best-checkpoint", help="fetch the checkpoint to keep, as a diffusers folder")
    parser.add_argument("run_or_folder", metavar="RUN", help="the id of an MLflow run, or an output folder")
    parser.add_argument("--metric", metavar="KEY", help="that with the lowest value of it, such as repr/icr, not the verdict's")
    parser.add_argument("--max", action="store_true", help="with --metric: the highest")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder; default: where it is, or a temporary one")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.tracking.checkpoints.best import check_output, choose, fetch

    check_output(arguments.output)
    if arguments.max and arguments.metric is None:
        raise ValueError("max is given without metric; expected --metric KEY, to take the highest value of")
    choice = choose(arguments.run_or_folder, metric=arguments.metric, maximum=arguments.max)
    say(choice.why)
    print(fetch(choice, arguments.output))
    return 0
