"""Run training scripts of diffusers unmodified: `python -m mlflow_icr.integrations.diffusers --data FOLDER SCRIPT [its flags]`.

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
from mlflow_icr.integrations.watch import STOP_VERDICTS
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


EXAMPLE = """example:
  python -m mlflow_icr.integrations.diffusers --data images/ train_unconditional.py --train_data_dir images/ --use_ema"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlflow_icr.integrations.diffusers",
        usage="%(prog)s --data DATA [flags] SCRIPT [the script's flags]",
        description="Run a training script of diffusers as it is, and measure its network while it trains.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script; its own flags follow it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="all or some training images: a folder, .zip or .npz"
    )
    what.add_argument(
        "--num-images", type=int, default=512, metavar="N", help="training images to measure, drawn from the data; default: 512"
    )
    what.add_argument("--num-samples", type=int, default=0, metavar="N", help="samples to look at; default: 0, none")
    what.add_argument("--layer", default="decoder", metavar="NAME", help="the layer whose features are read; default: decoder")
    what.add_argument(
        "--sigma", type=_numbers, default=(0.29,), metavar="X,Y,...", help="noise standard deviations; default: 0.29"
    )
    what.add_argument("--seed", type=int, default=0, metavar="N", help="seed of probe images, views and samples; default: 0")
    when = parser.add_argument_group("when")
    when.add_argument(
        "--every", type=int, metavar="N", help="measure every N images; default: three times in each doubling of images seen"
    )
    when.add_argument(
        "--at", type=_numbers, metavar="X,Y,...", help="measure at these numbers of images seen, such as 0,5000,20000"
    )
    when.add_argument(
        "--generate-every", default=SUSPICION, metavar="N", help="look at samples every N measurements; default: on suspicion"
    )
    when.add_argument(
        "--stop-on", default="", metavar="VERDICT", help=f"end the training at this verdict: {' or '.join(STOP_VERDICTS)}"
    )
    where = parser.add_argument_group("where results go")
    where.add_argument(
        "--output-dir", type=Path, default=Path("icr"), metavar="DIR", help="folder of the measurements; default: icr"
    )
    where.add_argument("--run-name", metavar="NAME", help="name of the MLflow run; default: MLflow chooses")
    where.add_argument("--save", action="store_true", help="save the measured weights of each measurement in checkpoints/")
    where.add_argument("--resume", action="store_true", help="continue in the output folder and in its MLflow run")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for impossible arguments, before the script starts."""
    if not arguments.script.is_file():
        raise ValueError(f"script is {str(arguments.script)!r}, which is no file; expected a training script")
    if arguments.data.is_dir():
        if not image_paths(arguments.data):
            raise ValueError(f"data is {str(arguments.data)!r}, a folder without images ({', '.join(sorted(RASTER_SUFFIXES))})")
    elif not (arguments.data.is_file() and arguments.data.suffix in (".zip", ".npz")):
        raise ValueError(f"data is {str(arguments.data)!r}; expected a folder, a .zip or a .npz file of images")
    if arguments.every is not None and arguments.at is not None:
        raise ValueError("every and at are both given; expected one of them")
    if arguments.stop_on not in ("", *STOP_VERDICTS):
        raise ValueError(f"stop_on is {arguments.stop_on!r}; expected one of {', '.join(STOP_VERDICTS)}")
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
    """Turn SIGTERM into an exception, so that the run is ended as KILLED."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script and watch its network; returns 2 with one line for bad input. Exceptions of the script are not caught."""
    arguments = _parser().parse_args(argv)
    try:
        _check(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"mlflow_icr.integrations.diffusers: error: {error}", file=sys.stderr)
        return 2
    set_status = end_as_rank()
    from mlflow_icr.integrations.hooks import ScriptHooks  # imports torch, accelerate and diffusers, after the input is checked

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
                set_status(error.code or 0)
            raise
        hooks.close("FINISHED")
    return set_status(0)


if __name__ == "__main__":
    sys.exit(main())
