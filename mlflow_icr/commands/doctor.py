"""The command `mlflow-icr doctor`: whether this machine is ready."""

from __future__ import annotations

import argparse

from mlflow_icr.commands.console import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "doctor",
        "check whether this machine is ready",
        "Check versions, devices, memory, MLflow, encoders and plugins. One line a check, with what to do where it fails. The "
        "exit status is 1 if a check fails.",
        "mlflow-icr doctor",
    )
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="the MLflow server to check; default: MLFLOW_TRACKING_URI, or MLflow's own"
    )
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=PATH", help="files of encoder weights to check")
    parser.add_argument("--json", action="store_true", help="print the checks as a JSON list")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.doctor import doctor_command

    return doctor_command(arguments.tracking_uri, arguments.weights, as_json=arguments.json)
