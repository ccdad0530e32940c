"""Distances, diversity and copies of a set of generated images, as values of a report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation import (
    Detection,
    Reference,
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
from mlflow_icr.generation.neighbours import Search, k_nearest
from mlflow_icr.monitoring.grid import captioned, image_tiles, tile_grid

KERNEL_SUBSET = 1000  # images in a subset of the kernel distance, where there are so many
CARLINI_NEIGHBOURS = 50
PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
COPY_ENCODERS = ("sscd",)  # embeddings made for copy detection, where the largest cosine has a meaning
WITH_HELDOUT = ("precision", "recall", "density", "coverage", "fld")
WALL_PAIRS = 16


@dataclass
class Judgement:
    """Values by key, reasons for absent ones, warnings about values, and numbers (M,) for histograms."""

    values: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    distributions: dict[str, np.ndarray] = field(default_factory=dict)

    def finite(self) -> Judgement:
        """The same judgement; values that overflowed are moved to the absent ones."""
        for key in [key for key, value in self.values.items() if not math.isfinite(value)]:
            self.absent[key] = f"it is {self.values.pop(key)}: the embeddings are too far apart, or all the same"
        self.distributions = {key: numbers for key, numbers in self.distributions.items() if np.isfinite(numbers).all()}
        return self

    def detection(self, key: str, result: Detection, scale: float = 1.0) -> None:
        """Enter a detector's value with its interval."""
        self.values |= {key: scale * result.value, f"{key}_low": scale * result.low, f"{key}_high": scale * result.high}


def judge(fake: Tensor, train: Reference, heldout: Reference | None, encoder: str, *, search: Search = k_nearest) -> Judgement:
    """Judge embeddings of generated images (N, D) against training (M, D) and held-out ones (L, D), by an encoder's name.

    Copies are sought among training images; distances are taken to held-out ones, to training ones, and their difference
    (far above 0: the samples are nearer to the images that were trained on). `search` finds neighbours: exactly unless another
    is given. Every rank computes the same.
    """
    judgement = Judgement({"gen/num_samples": float(len(fake))})
    copies = memorization_ratio(fake, train.embeddings, search=search)
    judgement.detection(f"mem/ratio_{encoder}", copies)
    nearest = torch.linalg.vector_norm(fake.double() - train.embeddings[copies.nearest].double(), dim=1)
    for end, distances in (("", nearest), ("_train", train.own_distances)):
        judgement.distributions[f"mem/distance_{encoder}{end}"] = distances.cpu().numpy()
    judgement.detection(
        "mem/authpct", authenticity(train.embeddings, fake, own_distances=train.own_distances, search=search), 100
    )
    if len(train) >= CARLINI_NEIGHBOURS:
        judgement.detection("mem/carlini", carlini_ratio(fake, train.embeddings, CARLINI_NEIGHBOURS, search=search))
    else:
        judgement.absent["mem/carlini"] = f"needs {CARLINI_NEIGHBOURS} training images; there are {len(train)}"
    if encoder in COPY_ENCODERS:
        similar = copy_similarity(fake, train.embeddings, search=search)
        judgement.detection(f"mem/copies_{encoder}", similar)
        judgement.values[f"mem/copies_{encoder}_train"] = similar.train_value
    try:
        judgement.values["gen/vendi"] = vendi_score(fake)
    except ValueError as error:  # an all-black image has no direction
        judgement.absent["gen/vendi"] = str(error)
    _against(fake, train, "train", encoder, judgement)
    if heldout is None:
        why = "there are no held-out images to compare with"
        keys = [f"gen/{key}_{encoder}" for key in ("kid", "fd", "fd_gap")] + [f"gen/{key}" for key in WITH_HELDOUT]
        judgement.absent |= dict.fromkeys([*keys, "mem/ct"], why)
        return judgement.finite()
    _against(fake, heldout, "", encoder, judgement)
    gap, near, far = (f"gen/fd{middle}_{encoder}" for middle in ("_gap", "", "_train"))
    if {near, far} <= judgement.values.keys():
        judgement.values[gap] = judgement.values[near] - judgement.values[far]
    else:
        judgement.absent[gap] = judgement.absent[near]
    _with_heldout(fake, train.embeddings, heldout.embeddings, judgement)
    return judgement.finite()


def _against(fake: Tensor, real: Reference, which: str, encoder: str, judgement: Judgement) -> None:
    """Kernel and Frechet distance to one set of real images."""
    middle = f"_{which}" if which else ""
    smallest = min(len(fake), len(real))
    keys = (f"gen/kid{middle}_{encoder}", f"gen/fd{middle}_{encoder}")
    if smallest < 2:
        judgement.absent |= dict.fromkeys(keys, f"needs at least 2 images on both sides; {smallest} on one")
        return
    mean, std = kernel_distance(fake, real.embeddings, subset_size=min(KERNEL_SUBSET, smallest))
    judgement.values[keys[0]] = mean
    judgement.values[f"{keys[0]}_std"] = std
    key = keys[1]
    judgement.values[key] = frechet_distance(fake, real.gaussian)
    if smallest <= fake.shape[1]:
        judgement.warnings[key] = (
            f"of {len(fake)} and {len(real)} images in {fake.shape[1]} dimensions: too few for a covariance, so that the value "
            "is too large; read the kernel distance (kid)"
        )


def _with_heldout(fake: Tensor, train: Tensor, heldout: Tensor, judgement: Judgement) -> None:
    """The values besides distances that need held-out images."""
    if min(len(fake), len(heldout)) > DENSITY_NEIGHBOURS:
        pairs = (
            (("precision", "recall"), precision_recall(heldout, fake, PRECISION_NEIGHBOURS)),
            (("density", "coverage"), density_coverage(heldout, fake, DENSITY_NEIGHBOURS)),
        )
        for names, values in pairs:
            judgement.values |= {f"gen/{name}": value for name, value in zip(names, values, strict=True)}
    else:
        why = f"needs more than {DENSITY_NEIGHBOURS} generated and held-out images"
        judgement.absent |= {f"gen/{name}": why for name in ("precision", "recall", "density", "coverage")}
    try:
        judgement.values["gen/fld"] = fld(train, heldout, fake)
    except ValueError as error:
        judgement.absent["gen/fld"] = str(error)
    try:
        judgement.values["mem/ct"] = ct_score(train, heldout, fake, 0)
    except ValueError as error:
        judgement.absent["mem/ct"] = str(error)


def copy_wall(fake: Tensor, train: Tensor, detection: Detection) -> np.ndarray:
    """The most suspicious generated images (N, C, H, W), worst first, each above its nearest training image (M, C, H, W).

    Below each pair stands the detector's score: for `memorization_ratio` the distance as a share of that to the second nearest.
    """
    order = torch.argsort(detection.scores, stable=True)[:WALL_PAIRS].cpu()
    above, below = (
        image_tiles((as_unit_interval(images[rows]) * 255).round().to(torch.uint8))
        for images, rows in ((fake, order), (train, detection.nearest.cpu()[order]))
    )
    line = np.full_like(above[:, :2], 255)
    pairs = captioned(np.concatenate([above, line, below], axis=1), [f"{s:.3f}" for s in detection.scores[order].tolist()])
    return tile_grid(pairs, max(1, -(-len(order) // 2)))
