"""diffusers' training scripts as they are: `python -m mlflow_icr.integrations.diffusers --data FOLDER SCRIPT [its flags]`.

Made for examples/unconditional_image_generation/train_unconditional.py, and for scripts of its kind: one unconditional network
on pixels, prepared by Accelerate, and a scheduler with `add_noise`. Under several ranks: `accelerate launch -m
mlflow_icr.integrations.diffusers ...`.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mlflow_icr.extraction.images import RASTER_SUFFIXES, image_paths
from mlflow_icr.integrations.ending import end_as_rank
from mlflow_icr.integrations.watch import STOPPING
from mlflow_icr.monitoring.protocol import Protocol
from mlflow_icr.monitoring.schedule import SUSPICION, looks_every, measuring_steps
from mlflow_icr.tracking import check_folder
from mlflow_icr.tracking.ending import status_of


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them: with spaces, the script's name would be one of them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers with commas between them") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlflow_icr.integrations.diffusers",
        usage="%(prog)s --data DATA [flags] SCRIPT [the script's flags]",
        description="Run a diffusers training script as it is, and measure its network while it trains.",
    )
    parser.add_argument("--data", type=Path, required=True, help="the training images, or some of them: folder, .zip or .npz")
    parser.add_argument("--output-dir", type=Path, default=Path("icr"), help="of the measurements; the script has its own")
    parser.add_argument("--every", type=int, help="measure every so many images; default: three times in each doubling")
    parser.add_argument("--at", type=_numbers, help="measure at these numbers of images seen, such as 0,5000,20000")
    parser.add_argument("--num-images", type=int, default=512, help="training images to measure on, drawn from the data")
    parser.add_argument("--num-samples", type=int, default=0, help="samples to judge; 0 for none")
    parser.add_argument(
        "--generate-every",
        default=SUSPICION,
        metavar="N",
        help="measurements from one look at samples to the next, or suspicion",
    )
    parser.add_argument("--layer", default="decoder")
    parser.add_argument("--sigma", type=_numbers, default=(0.29,), help="noise standard deviations, such as 0.29,1")
    parser.add_argument("--seed", type=int, default=0, help="of the images that are drawn, of views and of samples")
    parser.add_argument("--save", action="store_true", help="keep the measured weights of each measurement, in checkpoints/")
    parser.add_argument("--stop-on", default="", help=f"end the training with this verdict: {' or '.join(STOPPING)}")
    parser.add_argument("--run-name")
    parser.add_argument("--resume", action="store_true", help="go on in the output folder, and in its MLflow run")
    parser.add_argument("script", type=Path, help="the training script; its flags follow, as they are")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what cannot be, before the script starts."""
    if not arguments.script.is_file():
        raise ValueError(f"script is {str(arguments.script)!r}, which is no file; expected a training script")
    if arguments.data.is_dir():
        if not image_paths(arguments.data):
            raise ValueError(f"data is {str(arguments.data)!r}, a folder without images ({', '.join(sorted(RASTER_SUFFIXES))})")
    elif not (arguments.data.is_file() and arguments.data.suffix in (".zip", ".npz")):
        raise ValueError(f"data is {str(arguments.data)!r}; expected a folder, a .zip or a .npz file of images")
    if arguments.every is not None and arguments.at is not None:
        raise ValueError("every and at are both given; expected one of them")
    if arguments.stop_on not in ("", *STOPPING):
        raise ValueError(f"stop_on is {arguments.stop_on!r}; expected one of {', '.join(STOPPING)}")
    if arguments.num_samples < 0:
        raise ValueError(f"num_samples is {arguments.num_samples}; expected 0 for none, or more")
    looks_every(arguments.generate_every)
    if arguments.num_images < 2:
        raise ValueError(f"num_images is {arguments.num_images}; expected at least 2")
    Protocol(layer=arguments.layer, sigmas=arguments.sigma, seed=arguments.seed)
    if arguments.at is not None:
        arguments.at = tuple(map(int, arguments.at))
    measuring_steps(arguments.at if arguments.every is None else arguments.every)
    if os.environ.get("RANK", "0") == "0":
        check_folder(arguments.output_dir, arguments.resume)


def _terminate(number: int, frame: FrameType | None) -> None:
    """A SIGTERM as an exception, so that the run is ended as KILLED."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script with its network watched; returns 2 with one line for bad input. What the script raises goes through."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"mlflow_icr.integrations.diffusers: error: {error}", file=sys.stderr)
        return 2
    tell = end_as_rank()
    from mlflow_icr.integrations.hooks import ScriptHooks  # torch, accelerate and diffusers, once the input is good

    logging.getLogger("mlflow_icr").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    # As Python itself would run it.
    sys.argv = [str(arguments.script), *arguments.arguments]
    sys.path[0] = str(arguments.script.resolve().parent)
    with ScriptHooks(arguments) as hooks:
        try:
            runpy.run_path(str(arguments.script), run_name="__main__")
        except BaseException as error:
            hooks.close(status_of(error))
            if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
                tell(error.code or 0)
            raise
        hooks.close("FINISHED")
    return tell(0)


if __name__ == "__main__":
    sys.exit(main())
