"""The command `mlflow-icr rank-images`: which training images the residual energy is in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlflow_icr.commands.console import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("rank-images", help="training images by their share in the residual energy, as CSV")
    parser.add_argument("folder", type=Path, help="an output folder")
    parser.add_argument("--step", type=int, help="images seen; default: the newest measurement")
    parser.add_argument("--top", type=int, help="default: all")
    parser.add_argument("--classes", action="store_true", help="classes instead of images, where there are labels")
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
