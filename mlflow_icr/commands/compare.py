"""The command `mlflow-icr compare`: two measurements of a run, paired by image."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow_icr.commands.console import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("compare", help="debiased ICR of a run at step B less step A, paired by image, as JSON")
    parser.add_argument("folder", type=Path, help="an output folder")
    parser.add_argument("step_a", type=int, metavar="A", help="images seen")
    parser.add_argument("step_b", type=int, metavar="B", help="images seen")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mlflow_icr.monitoring.compare import compare

    print(json.dumps(asdict(compare(arguments.step_a, arguments.step_b, folder=arguments.folder)), indent=2))
    return 0
