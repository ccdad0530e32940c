"""The command `mlflow-icr watch`: measure the checkpoints of any trainer while it runs.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_icr.commands.console import Commands, add_layer, add_loading, add_views, echo, loading_of, protocol_of

if TYPE_CHECKING:
    from mlflow_icr.monitoring import Verdict

DESCRIPTION = """\
Watch a folder of checkpoints, beside any trainer: measure each new one, and say whether the model still learns or has begun to
copy its training images.

It takes diffusers folders, networks in one safetensors file, and LoRA files in kohya's, PEFT's and diffusers' formats. A
checkpoint is taken when it is completely written, and measured once. The command may be stopped and started again at any
time. Results go to MLflow, TensorBoard and a report."""
EXAMPLES = """\
examples:
  mlflow-icr watch --checkpoints output/ --data images/ --base stabilityai/stable-diffusion-xl-base-1.0 --resolution 1024 \\
    --device cuda:1 --dtype bfloat16 --follow
  mlflow-icr watch --checkpoints model/ --data images/          # diffusers folders that are there already

docs/trainers/ says what to set in kohya's sd-scripts, OneTrainer, ai-toolkit and diffusers' scripts."""


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "watch",
        help="measure the checkpoints of any trainer while it runs, and say whether the model has begun to copy",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is watched")
    what.add_argument("--checkpoints", type=Path, required=True, metavar="DIR", help="the folder that the trainer saves in")
    what.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the training images, a folder or a .zip")
    what.add_argument(
        "--base",
        metavar="PIPELINE",
        help="what the training began with: a diffusers folder, or a name on the hub; needed for LoRA and single files. It is "
        "measured too, at 0 images seen",
    )
    what.add_argument(
        "--images-per-step",
        type=int,
        metavar="N",
        help="the batch of a step; default: what kohya's files say, else 1",
    )
    what.add_argument(
        "--images-per-epoch",
        type=int,
        metavar="N",
        help="where names count epochs: their images; default: the number of training images",
    )
    when = parser.add_argument_group("when")
    when.add_argument("--follow", action="store_true", help="wait for more checkpoints; else measure what is there, and end")
    when.add_argument(
        "--poll", type=float, default=5.0, metavar="SECONDS", help="time between two looks at the folder; default: 5"
    )
    when.add_argument(
        "--settle", type=float, default=5.0, metavar="SECONDS", help="how long a checkpoint must be unchanged; default: 5"
    )
    when.add_argument(
        "--end-after", type=float, metavar="SECONDS", help="with --follow: end when nothing new has come for so long"
    )
    where = parser.add_argument_group("where results go")
    where.add_argument("--output-dir", type=Path, metavar="DIR", help="history, report and event files; default: DIR/icr")
    where.add_argument("--run-name", metavar="NAME", help="name of the MLflow run; default: the folder's")
    where.add_argument("--on-verdict", metavar="COMMAND", help="command or webhook URL to call when the verdict changes")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the images; default: the network's")
    add_loading(how)
    add_layer(how)
    add_views(how)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from mlflow_icr.integrations.checkpoint_watch import CheckpointWatch, Pace

    watch = CheckpointWatch(
        arguments.checkpoints,
        arguments.data,
        arguments.output_dir,
        base=arguments.base,
        images_per_step=arguments.images_per_step,
        images_per_epoch=arguments.images_per_epoch,
        protocol=protocol_of(arguments),
        batch_size=arguments.batch_size,
        run_name=arguments.run_name,
        pace=Pace(arguments.follow, arguments.poll, arguments.settle, arguments.end_after),
        echo=echo,
        on_verdict=_print,
        reaction=arguments.on_verdict,
        **loading_of(arguments),
    )
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        watch.run()
    except KeyboardInterrupt:
        echo("stopped; the same command resumes from here")
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return _ended(watch)


def _ended(watch: Any) -> int:
    """Print the outcome; returns the exit status, 1 if a checkpoint was left out."""
    verdict = watch.verdict
    for name, why in watch.left_out.items():
        echo(f"{name} is left out: {why}")
    if verdict is None:
        raise ValueError(f"checkpoints is {str(watch.folder)!r}, which holds no checkpoint; docs/trainers/ lists what counts")
    echo(f"{len(watch.measured)} checkpoints measured; all results are in {watch.output_dir}")
    _print(verdict)
    return 1 if watch.left_out else 0


def _print(verdict: Verdict) -> None:
    print(verdict.text.replace("**", "").replace("\n\n", "\n"), flush=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
