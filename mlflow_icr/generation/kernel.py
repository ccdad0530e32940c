"""Kernel distance: an unbiased squared MMD with a cubic kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mlflow_icr.generation.embeddings import check_embeddings


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / D + 1)^3 of all pairs."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate (Gretton et al. 2012, lemma 6), which may be negative."""
    n, m = len(x), len(y)
    within_x, within_y = _kernel(x, x), _kernel(y, y)
    same_x = (within_x.sum() - within_x.diagonal().sum()) / (n * (n - 1))
    same_y = (within_y.sum() - within_y.diagonal().sum()) / (m * (m - 1))
    return float(same_x + same_y - 2 * _kernel(x, y).mean())


def kernel_distance(
    x: Tensor, y: Tensor, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the unbiased squared MMD of embeddings (N, D) and (M, D), in float64.

    The kernel is (x.y / D + 1)^3; subsets are drawn without replacement, the same for the same seed, and the deviation has
    divisor num_subsets. Unlike a Frechet distance it has no bias at any sample size, and may be negative. It is called KID
    only when the embeddings are the FID Inception network's. Raises ValueError when a subset is larger than a set.
    Source: Binkowski et al. 2018, "Demystifying MMD GANs"; degree 3, gamma 1 / D and coefficient 1 as there (some programs let
    the degree vary).
    """
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(f"num_subsets is {num_subsets} and subset_size {subset_size}; expected at least 1 and 2")
    x = check_embeddings("x", x, at_least=2).double()
    y = check_embeddings("y", y, at_least=2, like=x).double()
    smaller = min(len(x), len(y))
    if subset_size > smaller:
        raise ValueError(f"subset_size is {subset_size}; expected at most {smaller}, the smaller set")
    generator = torch.Generator().manual_seed(seed)

    def subset(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=generator)[:subset_size].to(z.device)]

    values = torch.tensor([_squared_mmd(subset(x), subset(y)) for _ in range(num_subsets)], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))
