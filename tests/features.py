"""Simulated features with known covariances, and formulas written again in numpy."""

from __future__ import annotations

import numpy as np


def covariance(rng: np.random.Generator, dim: int, condition: float = 20.0) -> np.ndarray:
    """A positive definite (D, D) matrix with eigenvalues from 1 to 1/condition."""
    q, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    return (q * np.geomspace(1, 1 / condition, dim)) @ q.T


def gaussian_features(
    rng: np.random.Generator, n: int, k: int, sigma_s: np.ndarray, sigma_xi: np.ndarray, mean: float = 0.0
) -> np.ndarray:
    """(N, K, D): an invariant part of each image plus an independent residual for each view."""
    dim = len(sigma_s)
    s = rng.standard_normal((n, 1, dim)) @ np.linalg.cholesky(sigma_s + 1e-12 * np.eye(dim)).T
    xi = rng.standard_normal((n, k, dim)) @ np.linalg.cholesky(sigma_xi).T
    return mean + s + xi


def two_way(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sigma_s and Sigma_xi of (N, K, D) by two-way centring, straight from the definition."""
    n, k, _ = features.shape
    r = features - features.mean(1, keepdims=True) - features.mean(0, keepdims=True) + features.mean((0, 1))
    sigma_xi = np.einsum("nkd,nke->de", r, r) / ((n - 1) * (k - 1))
    sigma_t = np.atleast_2d(np.cov(features.mean(1), rowvar=False))
    return sigma_t - sigma_xi / k, sigma_xi
