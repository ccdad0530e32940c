"""The command `mlflow-icr compare`: two measurements of a run, paired by image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "compare",
        "compare the ICR of two measurements of a run, image by image",
        "Print the debiased ICR at step B minus that at step A, with its interval, as JSON. Both measurements have the same "
        "images in the same views, so the difference is paired by image.",
        "mlflow-icr compare outputs/first 4368 16032",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output folder of a run")
    parser.add_argument("step_a", type=int, metavar="A", help="images seen at the first measurement")
    parser.add_argument("step_b", type=int, metavar="B", help="images seen at the second measurement")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mlflow_icr.monitoring.compare import compare

    print(json.dumps(asdict(compare(arguments.step_a, arguments.step_b, folder=arguments.folder)), indent=2))
    return 0
