"""The command `mlflow-icr measure` on saved models: one, or the checkpoints that a training has left.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_icr.commands.console import Commands, add_reading, reading_of, say

if TYPE_CHECKING:
    from mlflow_icr.monitoring import Report
    from mlflow_icr.tracking import MLflowSink


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "measure",
        help="ICR of saved models on their training images, or copies and distances of generated images, as JSON",
    )
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="a diffusers folder, such as checkpoints/000000131072 of a run"
    )
    parser.add_argument("--data", type=Path, help="folder of training images")
    parser.add_argument("--generated", type=Path, help="generated images instead of a checkpoint: a folder, .zip or .npz")
    parser.add_argument("--train", type=Path, help="with --generated: the training images, likewise")
    parser.add_argument("--heldout", type=Path, help="with --generated: images that were not trained on, likewise")
    parser.add_argument("--encoder", default="pixels", help="with --generated: pixels, inception, sscd, dinov2, clip, ...")
    parser.add_argument("--encoder-weights", type=Path, help="its file, or folder")
    parser.add_argument("--resolution", type=int, help="side in pixels; with --generated where images differ in size")
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="with --generated: where scores.csv and the wall of pairs go; with "
        "--checkpoints: where the history does, default their folder's icr/",
    )
    parser.add_argument(
        "--run-id",
        help="an MLflow run to log to as well: with --checkpoints at their steps, else at --images-seen; default: "
        "MLFLOW_RUN_ID, which `mlflow run` sets",
    )
    add_options(parser)
    add_reading(parser)
    parser.set_defaults(run=measure)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of what is measured, and how, beside the checkpoint itself and its data."""
    parser.add_argument("--pipeline", help="the same, or a name on the hub; with --checkpoints: what the training began with")
    parser.add_argument(
        "--checkpoints", type=Path, help="a folder of numbered checkpoints, measured in order; prints the verdict"
    )
    parser.add_argument(
        "--images-per-step", type=int, default=1, help="with --checkpoints that are numbered by optimizer steps"
    )
    parser.add_argument(
        "--images-per-epoch",
        type=int,
        help="with --checkpoints whose names count epochs; default: the number of training images",
    )
    parser.add_argument("--prompt", default="", help="of a text-to-image model; default: the empty one")
    parser.add_argument("--class-label", type=int, help="of a model of classes; default: the one that means none")
    parser.add_argument("--device", help="such as cuda; default: the CPU")
    parser.add_argument("--dtype", default="float32", help="of the network's weights: float32, bfloat16 or float16")
    parser.add_argument("--batch-size", type=int, help="views at a time; default: 512, of latents 16")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that a pipeline brings along")
    parser.add_argument("--layer", default="decoder")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.29], help="noise standard deviations")
    parser.add_argument("--augmentation-level", type=int, default=3)
    parser.add_argument("--num-images", type=int, help="default: all of the folder")
    parser.add_argument("--num-views", type=int, help="default: as many as the layer's width needs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ridge", type=float, default=0.0)
    parser.add_argument("--projection", type=int, help="read this many principal directions, where views are too few")
    parser.add_argument("--shrinkage", default="none", help="of the residual covariance: none, ledoit-wolf or oas")
    parser.add_argument("--companions", nargs="+", default=[], help="further measures, such as alignment rankme lidar")
    parser.add_argument("--images-seen", type=int, default=0, help="written into the result as it is given")


def measure(arguments: argparse.Namespace) -> int:
    """Measure what the arguments name; returns the exit status. Raises ValueError for arguments that do not fit together."""
    if arguments.run_id is None:
        arguments.run_id = os.environ.get("MLFLOW_RUN_ID")
    if arguments.generated is not None:
        return _generated(arguments)
    place = arguments.checkpoint if arguments.pipeline is None else arguments.pipeline
    if arguments.data is None or (place is None and arguments.checkpoints is None):
        raise ValueError(
            "checkpoint and data are not both given; expected CHECKPOINT --data FOLDER, or --generated and --train, or "
            "--checkpoints DIR --data FOLDER"
        )
    if arguments.checkpoint is not None and not (arguments.pipeline is None and arguments.checkpoints is None):
        other = "--pipeline" if arguments.checkpoints is None else "--checkpoints"
        raise ValueError(f"checkpoint and {other} are both given; expected one of them")
    return _one(arguments, place) if arguments.checkpoints is None else _checkpoints(arguments)


def _one(arguments: argparse.Namespace, place: str | Path) -> int:
    if arguments.output_dir is not None:
        raise ValueError(f"output_dir is {str(arguments.output_dir)!r}; expected none without --generated or --checkpoints")
    if arguments.projection is not None and arguments.images_seen < 1:  # of an untrained network nothing is projected
        raise ValueError(f"images_seen is {arguments.images_seen}; expected a number > 0 where projection is given")
    from mlflow_icr.extraction.adapters.choose import image_channels
    from mlflow_icr.extraction.images import folder_labels, load_folder, with_channels
    from mlflow_icr.extraction.pipelines import batch_size_for, load_denoiser
    from mlflow_icr.monitoring import ICRMonitor

    protocol = _protocol(arguments)
    denoiser, resolution = load_denoiser(place, **_loading(arguments))
    images = with_channels(load_folder(arguments.data, resolution, **reading_of(arguments)), image_channels(denoiser))
    monitor = ICRMonitor(
        denoiser,
        images,
        protocol,
        companions=arguments.companions,
        labels=folder_labels(arguments.data),
        batch_size=arguments.batch_size or batch_size_for(denoiser),
    )
    digest = monitor.protocol.digest
    sink = None
    if arguments.run_id is not None:  # before any work: there may be no such run
        from mlflow_icr.integrations.backfill import measured_in
        from mlflow_icr.tracking import MLflowSink

        sink = MLflowSink(run_id=arguments.run_id, joins=True, known=measured_in(arguments.run_id, digest))
    report = monitor.measure(arguments.images_seen)
    _show(report, report.flat() | {"protocol_digest": digest}, sink, {"protocol_digest": digest})
    return 0


def _generated(arguments: argparse.Namespace) -> int:
    from mlflow_icr.monitoring.posthoc import measure_generated

    if arguments.train is None:
        raise ValueError("train is not given; expected the images that the generator was trained on, to look for copies among")
    found = measure_generated(
        arguments.generated,
        arguments.train,
        arguments.heldout,
        encoder=arguments.encoder,
        weights=arguments.encoder_weights,
        resolution=arguments.resolution,
        say=say,
    )
    if arguments.output_dir is not None:
        found.save(arguments.output_dir)
    sink = None
    if arguments.run_id is not None:
        from mlflow_icr.tracking import MLflowSink

        sink = MLflowSink(run_id=arguments.run_id, joins=True)
    _show(found.report(arguments.images_seen), found.values, sink, {})
    return 0


def _show(report: Report, values: Mapping[str, object], sink: MLflowSink | None, params: Mapping[str, object]) -> None:
    """Print values, and what a report has to say beside them; then log it to the run that a sink joins."""
    print(json.dumps(values, indent=2))
    for key, why in report.absent.items():
        say(f"{key} is absent: {why}")
    for key, text in report.warnings.items():
        say(f"{key} is {text}")
    if sink is not None:
        from mlflow_icr.integrations.backfill import add_to_run

        add_to_run(sink, report, params)


def _protocol(arguments: argparse.Namespace) -> Any:
    from mlflow_icr.monitoring import Protocol

    return Protocol(
        layer=arguments.layer,
        sigmas=tuple(arguments.sigma),
        augmentation_level=arguments.augmentation_level,
        num_images=arguments.num_images,
        num_views=arguments.num_views,
        seed=arguments.seed,
        ridge=arguments.ridge,
        projection=arguments.projection,
        shrinkage=arguments.shrinkage,
    )


def _loading(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `load_pipeline` is to know."""
    names = ("resolution", "device", "dtype", "prompt", "class_label", "trust_remote_code")
    return {name: getattr(arguments, name) for name in names}


def _checkpoints(arguments: argparse.Namespace) -> int:
    from mlflow_icr.integrations.backfill import measure_checkpoints

    if arguments.value_range is not None:  # a backfill may be gone on with, and must then be of the same images
        raise ValueError(f"value_range is {arguments.value_range!r}; expected none with --checkpoints")
    found = measure_checkpoints(
        arguments.checkpoints,
        arguments.data,
        arguments.output_dir,
        pipeline=arguments.pipeline,
        run_id=arguments.run_id,
        images_per_step=arguments.images_per_step,
        images_per_epoch=arguments.images_per_epoch,
        protocol=_protocol(arguments),
        companions=arguments.companions,
        batch_size=arguments.batch_size,
        say=say,
        **_loading(arguments),
    )
    for name, why in found.left_out.items():
        say(f"{name} is left out: {why}")
    say(f"{len(found.measured)} checkpoints measured, {len(found.known)} were before; all is in {found.output_dir}")
    print(found.verdict.text.replace("**", "").replace("\n\n", "\n"))
    return 0 if found.complete and not found.left_out else 1
