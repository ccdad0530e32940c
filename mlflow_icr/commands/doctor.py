"""The command `mlflow-icr doctor`: whether this machine is ready."""

from __future__ import annotations

import argparse

from mlflow_icr.commands.console import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("doctor", help="is this machine ready: versions, devices, MLflow, encoders, plugins; 1 if not")
    parser.add_argument("--tracking-uri", help="default: MLFLOW_TRACKING_URI, or MLflow's own")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=PATH", help="weights of encoders to check")
    parser.add_argument("--json", action="store_true", help="a list of checks, as JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.doctor import doctor_command

    return doctor_command(arguments.tracking_uri, arguments.weights, as_json=arguments.json)
