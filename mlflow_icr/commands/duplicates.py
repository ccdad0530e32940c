"""The command `mlflow-icr duplicates`: exact and near duplicates in a set of images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlflow_icr.commands.console import Commands, add_command, echo


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = add_command(
        commands,
        "duplicates",
        "list images of a training set that are nearly the same, as CSV",
        "List near-duplicates of a training set in groups, as CSV. Two images are near-duplicates if their distance is below "
        "a share of the distance of two images by chance.",
        "mlflow-icr duplicates --data photos/ > copies.csv",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="the images: a folder, an archive or a file of images"
    )
    how = parser.add_argument_group("how they are compared")
    how.add_argument(
        "--encoder", default="pixels", metavar="NAME", help="the encoder in which images are compared; default: pixels"
    )
    how.add_argument("--encoder-weights", type=Path, metavar="PATH", help="file of the encoder's weights, where it needs one")
    how.add_argument(
        "--resolution",
        default="64",
        metavar="SIZE",
        help="side in pixels, or HEIGHTxWIDTH, to which images are scaled; default: 64",
    )
    how.add_argument(
        "--threshold", type=float, metavar="SHARE", help="share of the distance of two images by chance; default: 0.15"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import csv

    from mlflow_icr.extraction.duplicates import exact_duplicates, pixel_hashes
    from mlflow_icr.extraction.encoders import load_encoder
    from mlflow_icr.extraction.images import ImageFiles, Reading, height_width, named, parse_size, read_items
    from mlflow_icr.generation.duplicates import THRESHOLD, near_duplicates

    files = ImageFiles(arguments.data)
    read = read_items(files, range(len(files)), Reading(height_width(parse_size(arguments.resolution))))
    for note in read.notes:
        echo(note)
    if read.unreadable:
        echo(f"{len(read.unreadable)} cannot be read, and are left out: {named(read.unreadable)}")
    names = [files.names[item] for item in read.items]
    images, shape = read.images, tuple(read.images.shape[1:])
    if arguments.encoder == "pixels" and images.element_size() == 1:  # compared as bytes, without a float copy of all
        embeddings = images.flatten(1)
    else:
        embeddings = load_encoder(arguments.encoder, weights=arguments.encoder_weights, shape=shape)(images)
    duplicates = near_duplicates(embeddings, THRESHOLD if arguments.threshold is None else arguments.threshold)
    hashes = pixel_hashes(images)
    nearest: dict[int, float] = {}
    for (i, j), distance in zip(duplicates.pairs.tolist(), duplicates.distances.tolist(), strict=True):
        nearest[i], nearest[j] = min(distance, nearest.get(i, 1.0)), min(distance, nearest.get(j, 1.0))
    copies = {index for indices in exact_duplicates(hashes) for index in indices}
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["group", "image", "distance", "exact"])
    groups = duplicates.groups(len(names))
    for number, group in enumerate(groups):
        for i in group:
            writer.writerow([number, names[i], f"{nearest[i]:.4f}", str(i in copies).lower()])
    repeats = sum(len(group) - 1 for group in groups)
    exact = sum(len(indices) - 1 for indices in exact_duplicates(hashes))
    echo(f"{len(names)} images: {repeats} are near-duplicates of others, in {len(groups)} groups; {exact} are exact")
    return 0
