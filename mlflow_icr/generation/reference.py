"""A set of real embeddings with values that are computed once, and used at every measurement."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mlflow_icr.generation.frechet import GaussianStatistics, gaussian_statistics
from mlflow_icr.generation.neighbours import Search, k_nearest


@dataclass(eq=False)
class Reference:
    """Real embeddings (N, D), their Gaussian statistics, and each one's distance to the nearest other, (N,) float64.

    The last two are computed on first use, and need two rows (ValueError). `search` finds neighbours: exactly
    unless another is given (`index_nearest`, for millions of rows).
    """

    embeddings: Tensor
    search: Search = k_nearest

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def gaussian(self) -> GaussianStatistics:
        """Mean and covariance, as the Frechet distance takes them."""
        return gaussian_statistics(self.embeddings)

    @cached_property
    def own_distances(self) -> Tensor:
        """Euclidean distance of each row to the nearest other one."""
        return self.search(self.embeddings, self.embeddings, 1, exclude_self=True).distances[:, 0]
