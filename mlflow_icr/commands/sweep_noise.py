"""The command `mlflow-icr sweep-noise`: ICR over noise levels and layers of a saved pipeline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command, add_reading, add_views, reading_of

# Noise levels of Li et al. 2026, figure 2, for EDM; written here so that --help does not wait for torch.
SIGMAS = (0.01, 0.02, 0.06, 0.14, 0.3, 0.59, 1.09, 1.92, 3.26)


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "sweep-noise",
        "measure the ICR of a saved pipeline over noise levels and layers",
        "Measure ICR over noise levels and layers of a saved pipeline, to choose where to measure. With labels a linear "
        "probe's accuracy is measured too. Prints JSON.",
        "mlflow-icr sweep-noise outputs/first/checkpoints/000000016032 --data photos/ --output-dir sweep",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a diffusers folder")
    data = parser.add_argument_group("images")
    data.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the training images; subfolders are classes")
    data.add_argument(
        "--test-data", type=Path, metavar="FOLDER", help="labelled images to test the probe on; default: cross-validation"
    )
    add_reading(data)
    how = parser.add_argument_group("where and how to measure")
    how.add_argument(
        "--layers", nargs="+", default=[], metavar="NAME", help="layers to read; default: all blocks of the network"
    )
    add_views(how, SIGMAS, "nine from 0.01 to 3.26")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where sweep.png and sweep.csv are written; default: nowhere"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import csv
    from dataclasses import asdict, fields

    from mlflow_icr.extraction.adapters.choose import image_channels
    from mlflow_icr.extraction.images import folder_labels, load_folder, with_channels
    from mlflow_icr.extraction.pipelines import batch_size_for, load_denoiser
    from mlflow_icr.monitoring.plots import sweep_figure
    from mlflow_icr.monitoring.protocol import Protocol
    from mlflow_icr.monitoring.sweep import LabelledImages, SweepPoint, sweep_noise

    denoiser, resolution = load_denoiser(arguments.checkpoint)
    channels = image_channels(denoiser)
    reading = reading_of(arguments)
    images = with_channels(load_folder(arguments.data, resolution, **reading), channels)
    labels = folder_labels(arguments.data)
    labelled = None if labels is None else LabelledImages(images, labels)
    if arguments.test_data is not None:
        test_labels = folder_labels(arguments.test_data)
        if labels is None or test_labels is None:
            raise ValueError("test_data is given, but a folder has no classes; expected one subfolder for each class in both")
        test_images = with_channels(load_folder(arguments.test_data, resolution, **reading), channels)
        labelled = LabelledImages(images, labels, test_images, test_labels)
    protocol = Protocol(augmentation_level=arguments.augmentation_level, num_views=arguments.num_views, seed=arguments.seed)
    sweep = sweep_noise(
        denoiser,
        images,
        sigmas=arguments.sigma,
        layers=arguments.layers,
        protocol=protocol,
        labelled=labelled,
        batch_size=batch_size_for(denoiser),
    )
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        sweep_figure({arguments.checkpoint.name: sweep}).savefig(arguments.output_dir / "sweep.png", dpi=130)
        with (arguments.output_dir / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(SweepPoint)])
            writer.writeheader()
            writer.writerows(asdict(point) for point in sweep.points)
    print(json.dumps(sweep.as_dict(), indent=2))
    return 0
