"""The command `mlflow-icr gate`: whether a run may be released, as an exit status."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_icr.commands.console import Commands, add_command

if TYPE_CHECKING:
    from mlflow_icr.reporting.material import RunMaterial


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "gate",
        "exit with 0 if a run may be released, else with 1 and the reason",
        "Judge the newest measurement of a run before a release. The exit status is 0 if it passes, else 1, and one line says "
        "why. A run without the measurement does not pass.",
        "mlflow-icr gate outputs/first --max-copies 0.01 --forbid memorizing",
    )
    parser.add_argument("target", metavar="RUN", help="an output folder, or an MLflow run: its id or runs:/ID")
    parser.add_argument(
        "--max-copies", type=float, metavar="SHARE", help="largest share of copies; the whole interval must not exceed it"
    )
    parser.add_argument(
        "--forbid", action="append", default=[], metavar="STATE", help="verdict that does not pass; may be repeated"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.reporting.gate import gate

    decision = gate(_material(arguments.target), arguments.max_copies, arguments.forbid)
    print(decision.text)
    return 0 if decision.passed else 1


def _material(name: str) -> RunMaterial:
    from mlflow_icr.reporting.gather import gather_folder, gather_run
    from mlflow_icr.tracking.mlflow import store

    if Path(name).is_dir():
        return gather_folder(name)
    if "/" in name.removeprefix("runs:/").rstrip("/"):
        raise ValueError(f"target is {name!r}, which is no folder; expected an output folder, or the id of an MLflow run")
    client = store.connect()
    return gather_run(client, store.get_run(client, name.removeprefix("runs:/").rstrip("/")))
