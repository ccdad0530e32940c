"""Does a generated image copy a training image? Nearest-neighbour detectors on embeddings.

Each returns a share as its `value`, the exact 95 % interval of that share, and for each generated image a score and the index
of its nearest training image. A detector that finds nothing among N images has an interval from 0 to about 3.7 / N.
Neighbours are searched exactly, unless `search` says otherwise (`index_nearest`, for millions of training images): then the
result's `recall` is below 1, and a copy whose original the search missed is not found.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.generation.embeddings import check_embeddings
from mlflow_icr.generation.neighbours import Search, k_nearest

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Detection:
    """A detector's result on N generated images: `value` with `low` and `high`, `scores` (N,), `nearest` (N,) in training.

    The detector's docstring defines the score, and which side of `threshold` is suspicious. `recall` is that of the search for
    neighbours: 1 for exact search.
    """

    value: float
    low: float
    high: float
    scores: Tensor
    nearest: Tensor
    threshold: float
    recall: float = 1.0


@dataclass(frozen=True, eq=False)
class MemorizationRatio(Detection):
    """Scores are distance to the nearest over distance to the second nearest training image; copies are below the threshold."""


@dataclass(frozen=True, eq=False)
class CopySimilarity(Detection):
    """Scores are cosines with the nearest training image; copies are above. `train_scores` (M,) are those of training images.

    `train_value` is the share of training images that are as similar to another: what the data's duplicates explain.
    """

    train_scores: Tensor = field(default_factory=lambda: torch.empty(0))
    train_value: float = float("nan")


@dataclass(frozen=True, eq=False)
class CarliniRatio(Detection):
    """Scores are distance to the nearest over half the mean distance to the k nearest; copies are below the threshold."""


@dataclass(frozen=True, eq=False)
class Authenticity(Detection):
    """Scores are distance to the nearest training image over that image's own nearest distance; authentic are above."""


def _share(suspicious: Tensor) -> tuple[float, float, float]:
    """The share of N images and its exact interval (Clopper & Pearson 1934)."""
    from scipy.stats import binomtest

    count, total = int(suspicious.sum()), len(suspicious)
    exact = binomtest(count, total).proportion_ci(LEVEL, method="exact")
    return count / total, float(exact.low), float(exact.high)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where both are 0: at distance 0 an image is a copy, also of a duplicate."""
    return torch.where(below > 0, above / below, torch.where(above > 0, torch.inf, 0.0))


def _pair(fake: Tensor, train: Tensor, at_least: int) -> tuple[Tensor, Tensor]:
    return (
        check_embeddings("fake", fake, at_least=1),
        check_embeddings("train", train, at_least=at_least, like=fake),
    )


def memorization_ratio(
    fake: Tensor, train: Tensor, threshold: float = 1 / 3, *, search: Search = k_nearest
) -> MemorizationRatio:
    """The share of generated embeddings (N, D) much nearer to one training embedding (M, D) than to any other.

    A copy has distance to the nearest / distance to the second nearest < threshold. An image at distance 0 from two
    training images scores 0: it is a copy of a duplicate. Raises ValueError for N < 1, M < 2, or a threshold outside (0, 1].
    Source: Gu et al. 2023, "On memorization in diffusion models".
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a number in (0, 1]")
    fake, train = _pair(fake, train, 2)
    neighbours = search(fake, train, 2)
    scores = _ratio(neighbours.distances[:, 0], neighbours.distances[:, 1])
    return MemorizationRatio(*_share(scores < threshold), scores, neighbours.indices[:, 0], threshold, neighbours.recall)


def copy_similarity(fake: Tensor, train: Tensor, threshold: float = 0.6, *, search: Search = k_nearest) -> CopySimilarity:
    """The share of generated embeddings (N, D) whose largest cosine with a training embedding (M, D) exceeds the threshold.

    In the embedding of a copy-detection network (SSCD) 0.6 means a copy; others need another threshold. Raises
    ValueError for N < 1, M < 2, a zero embedding, or a threshold outside (-1, 1). Source: Pizzi et al. 2022; Li et al. 2026.
    """
    if not -1 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; expected a number in (-1, 1)")
    fake, train = _pair(fake, train, 2)
    for name, x in (("fake", fake), ("train", train)):
        if not bool((x.abs().amax(1) > 0).all()):
            raise ValueError(f"{name} holds an embedding that is all 0; a cosine needs a direction")
    fake, train = normalize(fake.double(), dim=1), normalize(train.double(), dim=1)
    # The nearest of unit vectors is the most similar: cosine = 1 - distance^2 / 2.
    neighbours, own = search(fake, train, 1), search(train, train, 1, exclude_self=True)
    scores, train_scores = (1 - near.distances[:, 0].square() / 2 for near in (neighbours, own))
    recall = min(neighbours.recall, own.recall)
    value = float((train_scores > threshold).double().mean())
    return CopySimilarity(*_share(scores > threshold), scores, neighbours.indices[:, 0], threshold, recall, train_scores, value)


def carlini_ratio(
    fake: Tensor, train: Tensor, k: int = 50, threshold: float = 1.0, *, search: Search = k_nearest
) -> CarliniRatio:
    """The share of generated embeddings (N, D) nearer to a training embedding than half the mean distance to their k nearest.

    The score is distance to the nearest / (0.5 x mean distance to the k nearest). Raises ValueError for N < 1, k outside
    2 to M, or a threshold that is not positive. Source: Carlini et al. 2023, "Extracting training data from diffusion
    models", section 5.1.
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}; expected a positive number")
    fake, train = _pair(fake, train, 2)
    if not 2 <= k <= len(train):
        raise ValueError(f"k is {k}; expected 2 to {len(train)}, the number of training embeddings")
    neighbours = search(fake, train, k)
    scores = _ratio(neighbours.distances[:, 0], 0.5 * neighbours.distances.mean(1))
    return CarliniRatio(*_share(scores < threshold), scores, neighbours.indices[:, 0], threshold, neighbours.recall)


def authenticity(
    train: Tensor, fake: Tensor, *, own_distances: Tensor | None = None, search: Search = k_nearest
) -> Authenticity:
    """The share of generated embeddings (N, D) that are authentic: farther from their nearest training embedding than it is
    from its own nearest neighbour in training (M, D).

    Times 100 this is AuthPct; the score is the ratio of the two distances, authentic above 1. `own_distances` (M,) are those
    of training to itself where they are known (`Reference.own_distances`). Raises ValueError for N < 1 or M < 2.
    Source: Alaa et al. 2022, "How faithful is your synthetic data?".
    """
    fake, train = _pair(fake, train, 2)
    neighbours, recall = search(fake, train, 1), 1.0
    if own_distances is None:
        own_neighbours = search(train, train, 1, exclude_self=True)
        own_distances, recall = own_neighbours.distances[:, 0], own_neighbours.recall
    own, nearest = own_distances, neighbours.indices[:, 0]
    scores = _ratio(neighbours.distances[:, 0], own[nearest])
    authentic = own[nearest] < neighbours.distances[:, 0]
    return Authenticity(*_share(authentic), scores, nearest, 1.0, min(neighbours.recall, recall))
