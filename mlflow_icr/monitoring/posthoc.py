"""Compare images that any program has generated with the images that it was trained on."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mlflow_icr.extraction.cache import ReferenceCache
from mlflow_icr.extraction.encoders import load_encoder
from mlflow_icr.extraction.files import cache_folder
from mlflow_icr.extraction.images import ImageSet, named, read_images
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation import MemorizationRatio, memorization_ratio
from mlflow_icr.monitoring.judgement import copy_wall, judge
from mlflow_icr.monitoring.report import Report


@dataclass(frozen=True, eq=False)
class PostHoc:
    """Values, reasons for absences, warnings, the pixel detector's result, and a wall of the likeliest copies, (H, W, 3)."""

    values: Mapping[str, float]
    absent: Mapping[str, str]
    warnings: Mapping[str, str]
    copies: MemorizationRatio
    wall: np.ndarray

    def report(self, step: int) -> Report:
        """The result as a measurement at `step` images seen."""
        return Report(step, self.values, {"nearest": self.wall}, self.absent, warnings=self.warnings)

    def save(self, folder: Path) -> None:
        """Write `scores.csv`, one row for each generated image, the likeliest copy first, and `nearest.png`."""
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.wall).save(folder / "nearest.png")
        scores, nearest = self.copies.scores.tolist(), self.copies.nearest.tolist()
        with (folder / "scores.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["generated", "nearest_training", "distance_ratio"])
            writer.writerows((i, nearest[i], scores[i]) for i in sorted(range(len(scores)), key=lambda i: scores[i]))


def _read(name: str, path: Path, resolution: int | None, echo: Callable[[str], None]) -> Tensor:
    image_set: ImageSet = read_images(path, resolution)
    echo(f"{name}: {len(image_set.images)} images of {path}")
    if image_set.unreadable:
        echo(f"{name}: {len(image_set.unreadable)} cannot be read, and are left out: {named(image_set.unreadable)}")
    return image_set.images


def measure_generated(
    generated: Path,
    train: Path,
    heldout: Path | None = None,
    *,
    encoder: str = "pixels",
    weights: Path | None = None,
    resolution: int | None = None,
    echo: Callable[[str], None] = lambda text: None,
) -> PostHoc:
    """Copies, distances and diversity of generated images: folders, `.zip` or `.npz` files of images.

    `encoder` and `weights` are those of `load_encoder`; `echo` gets lines on how many images were read, and which could not be.
    Copies are also sought by pixels, whatever the encoder. Raises ValueError for sets without images or of different kinds.
    """
    sets = {"generated": _read("generated", generated, resolution, echo), "train": _read("train", train, resolution, echo)}
    if heldout is not None:
        sets["heldout"] = _read("heldout", heldout, resolution, echo)
    shape = tuple(sets["train"].shape[1:])
    for name, images in sets.items():
        if tuple(images.shape[1:]) != shape:
            raise ValueError(f"{name} images are {tuple(images.shape[1:])}, training images {shape}; expected the same")
    coder = load_encoder(encoder, weights=weights, shape=shape)
    cache = ReferenceCache(cache_folder())
    real = {name: cache.reference(coder, images) for name, images in sets.items() if name != "generated"}
    judgement = judge(coder(sets["generated"]), real["train"], real.get("heldout"), coder.name)
    pixels = {name: as_unit_interval(sets[name]).flatten(1) for name in ("generated", "train")}
    copies = memorization_ratio(pixels["generated"], pixels["train"])
    judgement.detection("mem/ratio_l2", copies)
    wall = copy_wall(sets["generated"], sets["train"], copies)
    return PostHoc(judgement.values, judgement.absent, judgement.warnings, copies, wall)
