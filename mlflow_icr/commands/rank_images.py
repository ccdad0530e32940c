"""The command `mlflow-icr rank-images`: training images by their share of the residual energy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "rank-images",
        "rank training images by their share of the residual energy, as CSV",
        "Rank the measured training images by their share of the residual energy, and by their influence on ICR, as CSV.",
        "mlflow-icr rank-images outputs/first --top 20",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output folder of a run")
    parser.add_argument("--step", type=int, metavar="N", help="images seen at the measurement; default: the newest")
    parser.add_argument("--top", type=int, metavar="N", help="how many rows to print; default: all")
    parser.add_argument("--classes", action="store_true", help="rank classes instead of images, where there are labels")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import csv

    from mlflow_icr.monitoring.ranking import rank_folder

    images, classes = rank_folder(arguments.folder, arguments.step)
    rows = classes if arguments.classes else images[: arguments.top]
    if not rows:
        raise ValueError(f"folder is {str(arguments.folder)!r}, whose training images have no classes")
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return 0
