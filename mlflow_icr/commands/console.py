"""What the commands share: the type of what they are added to, and a line for the person at the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how image files become images, as a training has them."""
    parser.add_argument(
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="values that are black and white, as in training"
    )
    parser.add_argument("--background", default="white", help="colour that transparent parts of images show; default: white")


def reading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """These options as `load_folder` takes them. Raises ValueError for a range that is none."""
    from mlflow_icr.extraction.images import check_value_range

    return {"value_range": check_value_range(arguments.value_range or ()), "background": arguments.background}


def say(text: str) -> None:
    """Print a line on standard error, which is not the result."""
    print(text, file=sys.stderr, flush=True)
