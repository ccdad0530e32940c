"""The values of a checkpoint that figures show: features on views, and measures of them by labels and in subsets.

Each function takes tensors and gives plain numbers; tests compute the same from the same features with numpy, scipy and
scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr import Denoiser, Protocol, alignment, class_separation, icr, icr_interval, silhouette
from mlflow_icr.monitoring.neighbours import invariant_part, nearest
from mlflow_icr.monitoring.reader import FeatureReader
from mlflow_icr.representation import ViewMoments

NEIGHBOURS = 9  # of an image, as in the paper's figure 6


def read_features(denoiser: Denoiser, images: Tensor, *, layer: str, sigma: float, views: int, level: int = 3) -> Tensor:
    """Features (N, K, D) of a layer on K views of each of N images (N, C, H, W)."""
    count = len(images)  # a protocol without a number measures at most 1024
    protocol = Protocol(layer=layer, sigmas=(sigma,), augmentation_level=level, num_images=count, num_views=views)
    return FeatureReader(denoiser, images, protocol, 256, 0).read(denoiser, sigma)


def contamination(features: Tensor) -> dict[str, Any]:
    """ICR of features (N, K, D): plug-in, debiased with its interval where views suffice, and each image's influence."""
    values: dict[str, Any] = {}
    try:
        values["icr"] = icr(features).icr
        interval = icr_interval(features)
    except ValueError as error:
        return values | {"absent": str(error)}
    bounds = {"icr_debiased": interval.value, "icr_low": interval.low, "icr_high": interval.high}
    return values | bounds | {"influence": interval.influence.double().tolist()}


def energies(features: Tensor) -> dict[str, Any]:
    """Traces of the invariant and the residual covariance of l2-normalised features (N, K, D), absent with a reason."""
    scaled = normalize(features.double(), dim=-1)
    try:
        spectrum = ViewMoments(features.shape[1], features.shape[2]).update(scaled).spectrum()
    except ValueError as error:
        return {"absent_energies": str(error)}
    return {"trace_invariant": spectrum.trace_invariant, "trace_residual": spectrum.trace_residual}


def class_measures(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Silhouette and class separation of first views, and the share of an image's neighbours by s that have its class."""
    first = normalize(features[:, 0].double(), dim=-1)
    s = invariant_part(features)
    neighbours = nearest(s, torch.arange(len(s)), NEIGHBOURS)  # (N, NEIGHBOURS)
    same = (labels[neighbours] == labels[:, None]).double().mean(1)
    error = float(same.std() / len(same) ** 0.5)
    return {
        "silhouette": silhouette(first, labels),
        "class_separation": class_separation(features, labels),
        "neighbour_agreement": float(same.mean()),
        "neighbour_agreement_error": error,
    }


def trajectory_values(features: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Everything of one checkpoint that depends on features alone."""
    values = contamination(features) | energies(features) | {"alignment": alignment(features)}
    return values if labels is None else values | class_measures(features, labels)


def subset_values(features: Tensor, sizes: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Plug-in and debiased ICR of nested subsets of the images of features (N, K, D), by size; absent with a reason."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(features)))
    rows = []
    for size in sorted({min(size, len(features)) for size in sizes} | {len(features)}):
        part = features[order[:size]]
        row: dict[str, Any] = {"images": size, "dim": int(features.shape[2])} | contamination(part)
        row.pop("influence", None)
        rows.append(row)
    return rows
