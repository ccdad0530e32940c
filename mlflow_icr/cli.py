"""The command line `mlflow-icr`: each command is a module of `mlflow_icr/commands/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlflow_icr.arguments import OneLineParser
from mlflow_icr.commands import (
    best_checkpoint,
    compare,
    doctor,
    duplicates,
    ema,
    encoders,
    export_tensorboard,
    gate,
    import_tensorboard,
    measure,
    rank_images,
    report,
    summary,
    sweep_noise,
    sync,
    verdict,
    watch,
)
from mlflow_icr.version import __version__

# In the order in which --help lists them.
COMMANDS = (
    watch,
    measure,
    sweep_noise,
    summary,
    verdict,
    gate,
    rank_images,
    compare,
    report,
    duplicates,
    encoders,
    doctor,
    sync,
    best_checkpoint,
    ema,
    export_tensorboard,
    import_tensorboard,
)

EXAMPLE = """\
`mlflow-icr COMMAND --help` explains a command.

example:
  mlflow-icr verdict outputs/first"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="mlflow-icr",
        description="Is a diffusion model still learning, or has it begun to copy its training images?",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, 2 with one line for bad input, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError) as error:
        print(f"mlflow-icr: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mlflow-icr: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
