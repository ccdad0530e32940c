"""Shared by the commands: how one is added with its help, options for reading images, and lines on standard error."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction


def add_command(commands: Commands, name: str, summary: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """Add a command: a line for the list of commands, a description, and examples for the end of its `--help`."""
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 100),
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how image files are read; they must be those of the training."""
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the values that are black and white, as in training; default: what the files say",
    )
    parser.add_argument(
        "--background", default="white", metavar="COLOUR", help="colour behind transparent parts of images; default: white"
    )


def reading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """These options as `load_folder` takes them. Raises ValueError for a range that is none."""
    from mlflow_icr.extraction.images import check_value_range

    return {"value_range": check_value_range(arguments.value_range or ()), "background": arguments.background}


def say(text: str) -> None:
    """Print a line on standard error, which is not the result."""
    print(text, file=sys.stderr, flush=True)
