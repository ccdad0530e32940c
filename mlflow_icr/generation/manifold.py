"""Fidelity and diversity by balls around embeddings: precision and recall, density and coverage."""

from __future__ import annotations

import torch
from torch import Tensor

from mlflow_icr.generation.embeddings import check_embeddings
from mlflow_icr.generation.neighbours import BUDGET_BYTES, k_nearest


def _radii(name: str, x: Tensor, k: int) -> Tensor:
    """Distance of each row (N,) to its k-th nearest other row."""
    if not 1 <= k < len(x):
        raise ValueError(f"k is {k}; expected 1 to {len(x) - 1}, the other rows of {name}")
    return k_nearest(x, x, k, exclude_self=True).distances[:, -1]


def balls_around(x: Tensor, centres: Tensor, radii: Tensor, budget_bytes: int = BUDGET_BYTES) -> Tensor:
    """The number of closed balls, with centres (M, D) and radii (M,), that hold each row of x (N, D); (N,) integers.

    Products in float64 decide all pairs, except those within rounding of a radius, which differences decide.
    """
    origin = centres.double().mean(0)
    c, squared_radii = centres.double() - origin, radii.double().square()
    sizes = c.square().sum(1)
    rows = max(1, budget_bytes // 4 // (8 * 3 * len(c)))
    counts = []
    for block in x.split(rows):
        b = block.double() - origin
        squared_norms = b.square().sum(1, keepdim=True)
        gap = squared_norms + sizes - 2 * b @ c.T - squared_radii  # (B, M), at most 0 inside
        margin = 4 * (c.shape[1] + 4) * torch.finfo(torch.float64).eps * (squared_norms + sizes + squared_radii)
        inside = gap < -margin
        row, column = (gap.abs() <= margin).nonzero(as_tuple=True)
        for part in torch.arange(len(row), device=row.device).split(max(1, budget_bytes // 4 // (16 * c.shape[1]))):
            exact = (block[row[part]].double() - centres[column[part]].double()).square().sum(1).sqrt()
            inside[row[part], column[part]] = exact <= radii[column[part]]
        counts.append(inside.sum(1))
    return torch.cat(counts)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of generated embeddings (M, D) against real ones (N, D), each from 0 to 1.

    Precision is the share of generated embeddings within the distance of some real one to its k-th nearest real neighbour,
    recall the share of real ones within such a ball of generated ones. Balls are closed, an embedding is not its own
    neighbour, and k is 3 as in the paper and in torch-fidelity (prdc and dgm-eval use 5; prdc's balls are open, so that a ball
    of radius 0 around duplicates holds nothing, not even copies). Raises ValueError for k outside 1 to N - 1 and M - 1.
    Source: Kynkaanniemi et al. 2019, "Improved precision and recall metric".
    """
    real = check_embeddings("real", real, at_least=2)
    fake = check_embeddings("fake", fake, at_least=2, like=real)
    precision = balls_around(fake, real, _radii("real", real, k)) > 0
    recall = balls_around(real, fake, _radii("fake", fake, k)) > 0
    return float(precision.double().mean()), float(recall.double().mean())


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage of generated embeddings (M, D) against real ones (N, D): density from 0 up, coverage to 1.

    Density is how many real balls hold a generated embedding on average, over k; coverage the share of real balls that hold
    one at all. Balls are closed: the distance to the k-th nearest other real embedding counts as inside. Raises ValueError
    for k outside 1 to N - 1. Source: Naeem et al. 2020, "Reliable fidelity and diversity metrics".
    """
    real = check_embeddings("real", real, at_least=2)
    fake = check_embeddings("fake", fake, at_least=1, like=real)
    radii = _radii("real", real, k)
    density = balls_around(fake, real, radii).double().mean() / k
    covered = k_nearest(real, fake, 1).distances[:, 0] <= radii
    return float(density), float(covered.double().mean())
