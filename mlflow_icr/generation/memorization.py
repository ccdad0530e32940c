"""Does a generated image copy a training image? Nearest-neighbour detectors on embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_icr.generation.embeddings import check_embeddings

CHUNK_BYTES = 256 * 2**20  # what one block of differences may take


@dataclass(frozen=True, eq=False)
class MemorizationRatio:
    """How many of the generated images are copies: `value` in [0, 1], with each image's `scores` and `nearest` (N,)."""

    value: float
    scores: Tensor  # (N,) distance to the nearest training image over distance to the second nearest
    nearest: Tensor  # (N,) index of the nearest training image
    threshold: float


def two_nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distances (N, 2) from each row of x (N, D) to its two nearest rows of y (M, D), and their indices (N, 2).

    Differences are taken in float64 before squaring, so that an exact copy is at distance 0; ties go to the lower index.
    """
    rows = max(1, CHUNK_BYTES // (8 * y.shape[0] * y.shape[1]))
    distances, indices = [], []
    for block in x.split(rows):
        squared = (block[:, None] - y).square().sum(-1)  # (rows, M)
        order = squared.sort(dim=1, stable=True)
        distances.append(order.values[:, :2].sqrt())
        indices.append(order.indices[:, :2])
    return torch.cat(distances), torch.cat(indices)


def memorization_ratio(fake: Tensor, train: Tensor, threshold: float = 1 / 3) -> MemorizationRatio:
    """The share of generated embeddings (N, D) much nearer to one training embedding (M, D) than to any other.

    A copy has distance to the nearest / distance to the second nearest < threshold. An image at distance 0 from two
    training images scores 0: it is a copy of a duplicate. Raises ValueError for N < 1, M < 2, or a threshold outside (0, 1].
    Source: Gu et al. 2023, "On memorization in diffusion models".
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a number in (0, 1]")
    fake = check_embeddings("fake", fake, at_least=1)
    train = check_embeddings("train", train, at_least=2, like=fake)
    distances, indices = two_nearest(fake, train)
    scores = torch.where(distances[:, 1] > 0, distances[:, 0] / distances[:, 1], 0.0)
    return MemorizationRatio(float((scores < threshold).double().mean()), scores, indices[:, 0], threshold)
