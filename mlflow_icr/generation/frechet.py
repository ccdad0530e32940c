"""Frechet distance between two sets of embeddings, as Gaussians, and its extrapolation to infinitely many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_icr.generation.embeddings import check_embeddings

POINTS = 15  # subset sizes of the extrapolation, as in Chong & Forsyth 2020
PRECISION = 1e-7  # relative, of the trace of the root
SMALLEST_SHARE = 0.1  # of the images, in the smallest subset: 5 000 of 50 000 in their paper


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Statistics of N embeddings for a Frechet distance: `count`, `mean` (D,), `root` with root' root = covariance, float64.

    The root has min(N, D) rows at most; the covariance's divisor is N - 1.
    """

    count: int
    mean: Tensor
    root: Tensor


def gaussian_statistics(x: Tensor) -> GaussianStatistics:
    """The statistics of embeddings (N, D). Raises ValueError for fewer than 2 rows or values that are not finite."""
    rows = _centred("x", x)
    return GaussianStatistics(rows.count, rows.mean, _short(rows.root))


def frechet_distance(x: Tensor | GaussianStatistics, y: Tensor | GaussianStatistics) -> float:
    """||mean x - mean y||^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of embeddings (N, D) and (M, D), in float64.

    Either side may be given by its `gaussian_statistics`. Never negative, never NaN, also for rank-deficient sets. It is
    called FID only when the embeddings are the FID Inception network's. Raises ValueError for fewer than 2 rows, different D,
    or values that are not finite. Source: Dowson & Landau 1982; Heusel et al. 2017.
    """
    a = x if isinstance(x, GaussianStatistics) else _centred("x", x)
    b = y if isinstance(y, GaussianStatistics) else _centred("y", y, like=a.root)
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"y has {len(b.mean)} dimensions where the other set has {len(a.mean)}; expected the same")
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * _root_trace(a, b)
    return max(0.0, float(distance))  # rounding alone can make equal sets negative


def _centred(name: str, x: Tensor, like: Tensor | None = None) -> GaussianStatistics:
    """Statistics whose root is not shortened to D rows, which would not pay for a single distance."""
    x = check_embeddings(name, x, at_least=2, like=like).double()
    mean = x.mean(0)
    return GaussianStatistics(len(x), mean, (x - mean) / (len(x) - 1) ** 0.5)


def _root_trace(x: GaussianStatistics, y: GaussianStatistics) -> Tensor:
    """tr (C_x C_y)^(1/2) for C_x = a' a and C_y = b' b.

    C_x C_y has the eigenvalues of b C_x b' and, with C_y = L L', of L' C_x L: one symmetric eigensolve. Where these are so
    small that their roots lose digits, as with fewer rows than dimensions, the trace is the nuclear norm of a b', which needs
    no inverse, square or regular matrix and takes longer.
    """
    a, b = x.root, y.root
    if min(x.count, y.count) > a.shape[1]:
        if len(b) == b.shape[1]:
            squares: Tensor | None = torch.linalg.eigvalsh(_gram(_short(a) @ b.T))
        else:
            factor, info = torch.linalg.cholesky_ex(_gram(b))
            squares = torch.linalg.eigvalsh(factor.T @ _gram(a) @ factor) if int(info) == 0 else None
        if squares is not None:
            roots = squares.clamp(min=0).sqrt()
            # Eigenvalues are off by a rounding of the largest one, and their roots by that over twice the root, but at most
            # by its own root.
            off = torch.finfo(squares.dtype).eps * squares[-1]
            error = torch.minimum(off.sqrt(), off / (2 * roots)).sum()
            if float(error) < PRECISION * float(roots.sum()):
                return roots.sum()
    return torch.linalg.svdvals(_short(a) @ _short(b).T).sum()


def _gram(a: Tensor) -> Tensor:
    """a' a by numpy, which computes only half of a symmetric result; torch computes all."""
    if a.device.type != "cpu":
        return a.T @ a
    rows = a.numpy()
    return torch.from_numpy(rows.T @ rows)


def _short(a: Tensor) -> Tensor:
    """A matrix r with r' r = a' a and at most D rows."""
    return torch.linalg.qr(a, mode="r").R if a.shape[0] > a.shape[1] else a


def frechet_distance_infinity(x: Tensor, y: Tensor, seed: int = 0) -> float:
    """The Frechet distance of x (N, D) to y (M, D) for infinitely many x: the value at N and below, extrapolated in 1 / N.

    The bias of a sampled distance falls with 1 / N, so a line through the distances of 15 random subsets, from a tenth of x
    to all of it, gives its limit; the estimate can be negative where the limit is 0. Raises ValueError for fewer than 20 rows
    of x, and as `frechet_distance`. Source: Chong & Forsyth 2020, "Effectively unbiased FID and Inception Score".
    """
    x = check_embeddings("x", x, at_least=20)
    y = check_embeddings("y", y, at_least=2, like=x)
    generator = torch.Generator().manual_seed(seed)
    n = x.shape[0]
    sizes = torch.linspace(max(2, SMALLEST_SHARE * n), n, POINTS).round().long().tolist()
    against = gaussian_statistics(y)
    distances = [frechet_distance(x[torch.randperm(n, generator=generator)[:size].to(x.device)], against) for size in sizes]
    inverse = torch.tensor([1 / size for size in sizes], dtype=torch.float64)
    values = torch.tensor(distances, dtype=torch.float64)
    centred = inverse - inverse.mean()
    slope = (centred * values).sum() / centred.square().sum()
    return float(values.mean() - slope * inverse.mean())
