"""What a set of generated images is worth: distances, diversity and copies, as values of a report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation import (
    Detection,
    authenticity,
    carlini_ratio,
    copy_similarity,
    ct_score,
    density_coverage,
    fld,
    frechet_distance,
    kernel_distance,
    memorization_ratio,
    precision_recall,
    vendi_score,
)
from mlflow_icr.monitoring.grid import image_grid

KERNEL_SUBSET = 1000  # images in a subset of the kernel distance, where there are so many
CARLINI_NEIGHBOURS = 50
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
COPY_ENCODERS = ("sscd",)  # embeddings made for copy detection, where the largest cosine has a meaning
WITH_HELDOUT = ("precision", "recall", "density", "coverage", "fld")
WALL_PAIRS = 16


@dataclass
class Judgement:
    """Values by key, reasons for what is absent, and warnings about what is there."""

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)

    def finite(self) -> Judgement:
        """The same, with values that overflowed among what is absent."""
        for key in [key for key, value in self.values.items() if not math.isfinite(value)]:
            self.absent[key] = f"it is {self.values.pop(key)}: the embeddings are too far apart, or all the same"
        return self

    def detection(self, key: str, found: Detection, scale: float = 1.0) -> None:
        """Enter a detector's value with its interval."""
        self.values |= {key: scale * found.value, f"{key}_low": scale * found.low, f"{key}_high": scale * found.high}


def judge(fake: Tensor, train: Tensor, heldout: Tensor | None, encoder: str) -> Judgement:
    """Judge embeddings of generated (N, D), training (M, D) and held-out images (L, D) by an encoder's name.

    Copies are sought among training images; distances are taken to held-out ones, to training ones, and their difference
    (far above 0: the samples are nearer to the images that were trained on). Every rank computes the same.
    """
    found = Judgement({"gen/num_samples": float(len(fake))})
    found.detection(f"mem/ratio_{encoder}", memorization_ratio(fake, train))
    found.detection("mem/authpct", authenticity(train, fake), 100)
    if len(train) >= CARLINI_NEIGHBOURS:
        found.detection("mem/carlini", carlini_ratio(fake, train, CARLINI_NEIGHBOURS))
    else:
        found.absent["mem/carlini"] = f"needs {CARLINI_NEIGHBOURS} training images; there are {len(train)}"
    if encoder in COPY_ENCODERS:
        copies = copy_similarity(fake, train)
        found.detection(f"mem/copies_{encoder}", copies)
        found.values[f"mem/copies_{encoder}_train"] = copies.train_value
    try:
        found.values["gen/vendi"] = vendi_score(fake)
    except ValueError as error:  # an all-black image has no direction
        found.absent["gen/vendi"] = str(error)
    _against(fake, train, "train", encoder, found)
    if heldout is None:
        why = "there are no held-out images to compare with"
        keys = [f"gen/{key}_{encoder}" for key in ("kid", "fd", "fd_gap")] + [f"gen/{key}" for key in WITH_HELDOUT]
        found.absent |= dict.fromkeys([*keys, "mem/ct"], why)
        return found.finite()
    _against(fake, heldout, "", encoder, found)
    gap, near, far = (f"gen/fd{middle}_{encoder}" for middle in ("_gap", "", "_train"))
    if {near, far} <= found.values.keys():
        found.values[gap] = found.values[near] - found.values[far]
    else:
        found.absent[gap] = found.absent[near]
    _with_heldout(fake, train, heldout, found)
    return found.finite()


def _against(fake: Tensor, real: Tensor, which: str, encoder: str, found: Judgement) -> None:
    """Kernel and Frechet distance to one set of real images."""
    middle = f"_{which}" if which else ""
    smallest = min(len(fake), len(real))
    keys = (f"gen/kid{middle}_{encoder}", f"gen/fd{middle}_{encoder}")
    if smallest < 2:
        found.absent |= dict.fromkeys(keys, f"needs at least 2 images on both sides; {smallest} on one")
        return
    mean, std = kernel_distance(fake, real, subset_size=min(KERNEL_SUBSET, smallest))
    found.values[keys[0]] = mean
    found.values[f"{keys[0]}_std"] = std
    key = keys[1]
    found.values[key] = frechet_distance(fake, real)
    if smallest <= fake.shape[1]:
        found.warnings[key] = (
            f"of {len(fake)} and {len(real)} images in {fake.shape[1]} dimensions: too few for a covariance, so that the value "
            "is too large; read the kernel distance (kid)"
        )


def _with_heldout(fake: Tensor, train: Tensor, heldout: Tensor, found: Judgement) -> None:
    """What needs held-out images beside the distances."""
    if min(len(fake), len(heldout)) > DENSITY_NEIGHBOURS:
        pairs = (
            (("precision", "recall"), precision_recall(heldout, fake, PRECISION_NEIGHBOURS)),
            (("density", "coverage"), density_coverage(heldout, fake, DENSITY_NEIGHBOURS)),
        )
        for names, values in pairs:
            found.values |= {f"gen/{name}": value for name, value in zip(names, values, strict=True)}
    else:
        why = f"needs more than {DENSITY_NEIGHBOURS} generated and held-out images"
        found.absent |= {f"gen/{name}": why for name in ("precision", "recall", "density", "coverage")}
    try:
        found.values["gen/fld"] = fld(train, heldout, fake)
    except ValueError as error:
        found.absent["gen/fld"] = str(error)
    try:
        found.values["mem/ct"] = ct_score(train, heldout, fake, 0)
    except ValueError as error:
        found.absent["mem/ct"] = str(error)


def copy_wall(fake: Tensor, train: Tensor, detection: Detection) -> np.ndarray:
    """The most suspicious generated images (N, C, H, W), each above its nearest training image (M, C, H, W), worst first."""
    order = torch.argsort(detection.scores, stable=True)[:WALL_PAIRS].cpu()
    pairs = []
    for images, rows in ((fake, order), (train, detection.nearest.cpu()[order])):
        pairs.append((as_unit_interval(images[rows]) * 255).round().to(torch.uint8))
    half = max(1, len(order) // 2)
    # Two double rows: generated above, training below.
    wall = [part[start : start + half] for start in range(0, len(order), half) for part in pairs]
    return image_grid(torch.cat(wall), half)
