"""The command `mlflow-icr measure`: one saved model, the checkpoints of a training, or generated images.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_icr.commands.console import (
    Commands,
    add_command,
    add_layer,
    add_loading,
    add_reading,
    add_views,
    echo,
    loading_of,
    protocol_of,
    reading_of,
)

if TYPE_CHECKING:
    from mlflow_icr.monitoring import Report
    from mlflow_icr.tracking import MLflowSink


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "measure",
        "measure saved models, or images that a model generated",
        "Measure one saved model (CHECKPOINT), all checkpoints of a training (--checkpoints), or images that a model generated "
        "(--generated). Prints JSON; with --checkpoints it prints the verdict.",
        "mlflow-icr measure outputs/first/checkpoints/000000016032 --data photos/",
        "mlflow-icr measure --checkpoints model/ --data photos/ --images-per-step 16",
        "mlflow-icr measure --generated samples/ --train photos/",
    )
    _add_what(parser)
    _add_model(parser.add_argument_group("the model"))
    _add_protocol(parser.add_argument_group("how a model is measured"))
    parser.set_defaults(run=measure)


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("one model, or the checkpoints of a training")
    what.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="CHECKPOINT",
        help="a diffusers folder, such as checkpoints/000000131072 of a run",
    )
    what.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="a folder of numbered checkpoints; they are measured in order"
    )
    what.add_argument("--data", type=Path, metavar="FOLDER", help="the training images, a folder or an archive")
    what.add_argument(
        "--images-per-step",
        type=int,
        default=1,
        metavar="N",
        help="with --checkpoints that are numbered by optimizer steps: images of one step; default: 1",
    )
    what.add_argument(
        "--images-per-epoch",
        type=int,
        metavar="N",
        help="with --checkpoints that are numbered by epochs: images of one epoch; default: the number of training images",
    )
    samples = parser.add_argument_group("images that a model generated")
    samples.add_argument("--generated", type=Path, metavar="DIR", help="the generated images: a folder, .zip or .npz")
    samples.add_argument("--train", type=Path, metavar="DIR", help="with --generated: the training images")
    samples.add_argument("--heldout", type=Path, metavar="DIR", help="with --generated: images that were not trained on")
    samples.add_argument(
        "--encoder",
        default="pixels",
        metavar="NAME",
        help="with --generated: pixels, efficientnet_lite0, inception, sscd, dinov2, clip or torchscript:PATH; default: pixels",
    )
    samples.add_argument("--encoder-weights", type=Path, metavar="PATH", help="the encoder's weights, a file or a folder")
    images = parser.add_argument_group("how images are read")
    images.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="side to which images are scaled; default: the model's, or that of the images",
    )
    add_reading(images)
    where = parser.add_argument_group("where results go")
    where.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="with --generated: scores.csv and pictures of likely copies; with --checkpoints: the history, default DIR/icr",
    )
    where.add_argument(
        "--run-id", metavar="ID", help="log to this MLflow run too; default: MLFLOW_RUN_ID, which `mlflow run` sets"
    )
    where.add_argument(
        "--images-seen", type=int, default=0, metavar="N", help="the step of the result, except with --checkpoints; default: 0"
    )


def _add_model(model: argparse._ArgumentGroup) -> None:
    model.add_argument(
        "--pipeline",
        metavar="PIPELINE",
        help="a diffusers folder or a name on the hub, in place of CHECKPOINT; with --checkpoints: what training began with",
    )
    add_loading(model)


def _add_protocol(how: argparse._ArgumentGroup) -> None:
    add_layer(how)
    add_views(how)
    how.add_argument(
        "--ridge", type=float, default=0.0, metavar="X", help="added to the variances of the residual covariance; default: 0"
    )
    how.add_argument(
        "--projection",
        type=int,
        metavar="N",
        help="number of principal directions to read, where views are too few; default: all",
    )
    how.add_argument(
        "--shrinkage",
        default="none",
        metavar="NAME",
        help="shrinkage of the residual covariance: none, ledoit-wolf or oas; default: none",
    )
    how.add_argument(
        "--companions",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further measures, such as alignment rankme lidar; default: none",
    )


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
    return _one_model(arguments, place) if arguments.checkpoints is None else _checkpoints(arguments)


def _one_model(arguments: argparse.Namespace, place: str | Path) -> int:
    if arguments.output_dir is not None:
        raise ValueError(f"output_dir is {str(arguments.output_dir)!r}; expected none without --generated or --checkpoints")
    if arguments.projection is not None and arguments.images_seen < 1:  # it is fitted to a trained network
        raise ValueError(f"images_seen is {arguments.images_seen}; expected a number > 0 where projection is given")
    from mlflow_icr.extraction.adapters.choose import image_channels
    from mlflow_icr.extraction.images import folder_labels, load_folder, with_channels
    from mlflow_icr.extraction.pipelines import batch_size_for, load_denoiser
    from mlflow_icr.monitoring import ICRMonitor

    protocol = protocol_of(arguments)
    denoiser, resolution = load_denoiser(place, **loading_of(arguments))
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
        raise ValueError("train is not given; expected the images that the generator was trained on, to find copies of them")
    scores = measure_generated(
        arguments.generated,
        arguments.train,
        arguments.heldout,
        encoder=arguments.encoder,
        weights=arguments.encoder_weights,
        resolution=arguments.resolution,
        echo=echo,
    )
    if arguments.output_dir is not None:
        scores.save(arguments.output_dir)
    sink = None
    if arguments.run_id is not None:
        from mlflow_icr.tracking import MLflowSink

        sink = MLflowSink(run_id=arguments.run_id, joins=True)
    _show(scores.report(arguments.images_seen), scores.values, sink, {})
    return 0


def _show(report: Report, values: Mapping[str, object], sink: MLflowSink | None, params: Mapping[str, object]) -> None:
    """Print values, and a report's absences and warnings; then log the report to the run that a sink joins."""
    print(json.dumps(values, indent=2))
    for key, why in report.absent.items():
        echo(f"{key} is absent: {why}")
    for key, text in report.warnings.items():
        echo(f"{key} is {text}")
    if sink is not None:
        from mlflow_icr.integrations.backfill import add_to_run

        add_to_run(sink, report, params)


def _checkpoints(arguments: argparse.Namespace) -> int:
    from mlflow_icr.integrations.backfill import measure_checkpoints

    if arguments.value_range is not None:  # a backfill may be resumed, and must then use the same images
        raise ValueError(f"value_range is {arguments.value_range!r}; expected none with --checkpoints")
    backfill = measure_checkpoints(
        arguments.checkpoints,
        arguments.data,
        arguments.output_dir,
        pipeline=arguments.pipeline,
        run_id=arguments.run_id,
        images_per_step=arguments.images_per_step,
        images_per_epoch=arguments.images_per_epoch,
        protocol=protocol_of(arguments),
        companions=arguments.companions,
        batch_size=arguments.batch_size,
        echo=echo,
        **loading_of(arguments),
    )
    for name, why in backfill.left_out.items():
        echo(f"{name} is left out: {why}")
    echo(
        f"{len(backfill.measured)} checkpoints measured, {len(backfill.known)} were before; "
        f"all results are in {backfill.output_dir}"
    )
    print(backfill.verdict.text.replace("**", "").replace("\n\n", "\n"))
    return 0 if backfill.complete and not backfill.left_out else 1
