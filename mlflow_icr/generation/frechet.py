"""Frechet distance between two sets of embeddings, as Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from mlflow_icr.generation.embeddings import check_embeddings


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the rows scaled so that A' A is the covariance (divisor N - 1), (N, D)."""
    mean = x.mean(0)
    return mean, (x - mean) / (x.shape[0] - 1) ** 0.5


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """||mean x - mean y||^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of embeddings (N, D) and (M, D), in float64.

    It is called FID only when the embeddings are the FID Inception network's. Raises ValueError for fewer than 2 rows,
    different D, or values that are not finite. Source: Dowson & Landau 1982; Heusel et al. 2017.
    """
    x = check_embeddings("x", x, at_least=2)
    y = check_embeddings("y", y, at_least=2, like=x)
    mean_x, a = _centred(x)  # C_x = a' a
    mean_y, b = _centred(y)
    # tr (C_x C_y)^(1/2) is the nuclear norm of a b': no matrix square root, and rank-deficient sets need no care. Where
    # there are more rows than dimensions, D x D factors of the covariances stand in for the rows.
    a, b = _short(a), _short(b)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    distance = (mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    return max(0.0, float(distance))  # rounding alone can make equal sets negative


def _short(a: Tensor) -> Tensor:
    """A matrix r with r' r = a' a and at most D rows."""
    return torch.linalg.qr(a, mode="r").R if a.shape[0] > a.shape[1] else a
