"""Functions that commands share: add a command, add options for images, models and views, print on standard error."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
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


def add_loading(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how a model is loaded and read."""
    parser.add_argument("--prompt", default="", metavar="TEXT", help="prompt of a text-to-image model; default: the empty one")
    parser.add_argument(
        "--class-label", type=int, metavar="N", help="class of a class-conditional model; default: the one that means none"
    )
    parser.add_argument("--device", metavar="NAME", help="device, such as cuda:1; default: the CPU")
    parser.add_argument(
        "--dtype", default="float32", metavar="TYPE", help="type of the weights: float32, bfloat16 or float16; default: float32"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="views in one forward pass; default: 512, or 16 of latents")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that a pipeline contains")


def loading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_loading` and the resolution as `load_pipeline` takes them."""
    for name in ("resolution", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected a whole number >= 1")
    names = ("resolution", "device", "dtype", "prompt", "class_label", "trust_remote_code")
    return {name: getattr(arguments, name) for name in names}


def add_layer(parser: argparse._ActionsContainer) -> None:
    """Add the options for the layer that is read, and the number of images."""
    parser.add_argument(
        "--layer", default="decoder", metavar="NAME", help="the layer whose features are read; default: decoder"
    )
    parser.add_argument("--num-images", type=int, metavar="N", help="training images that are measured; default: all")


def add_views(parser: argparse._ActionsContainer, sigmas: Sequence[float] = (0.29,), shown: str = "0.29") -> None:
    """Add the options of the views; `sigmas` is the default of --sigma, and `shown` stands for it in the help."""
    parser.add_argument(
        "--sigma", type=float, nargs="+", default=list(sigmas), metavar="X", help=f"noise standard deviations; default: {shown}"
    )
    parser.add_argument(
        "--augmentation-level", type=int, default=3, metavar="N", help="strength of the views' augmentations; default: 3"
    )
    parser.add_argument(
        "--num-views", type=int, metavar="N", help="views of each image; default: as many as the widest layer needs"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of views and noise; default: 0")


def protocol_of(arguments: argparse.Namespace) -> Any:
    """The protocol of the options: layer and views, and those of `optional` that the command has."""
    from mlflow_icr.monitoring import Protocol

    optional = ("ridge", "projection", "shrinkage")
    names = (
        "layer",
        "num_images",
        "augmentation_level",
        "num_views",
        "seed",
        *(name for name in optional if name in arguments),
    )
    return Protocol(sigmas=tuple(arguments.sigma), **{name: getattr(arguments, name) for name in names})


def reading_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_reading` as `load_folder` takes them. Raises ValueError for an invalid range."""
    from mlflow_icr.extraction.images import check_value_range

    return {"value_range": check_value_range(arguments.value_range or ()), "background": arguments.background}


def echo(text: str) -> None:
    """Print a line on standard error; standard output is for results."""
    print(text, file=sys.stderr, flush=True)
