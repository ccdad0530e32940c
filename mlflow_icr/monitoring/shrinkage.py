"""Shrinkage of a residual covariance that too few views leave ill-conditioned or singular."""

from __future__ import annotations

import torch
from torch import Tensor

from mlflow_icr.representation import InvariantSpectrum, ViewMoments


def shrunk(moments: ViewMoments, residuals: Tensor, method: str) -> InvariantSpectrum:
    """The spectrum with Sigma_xi shrunk toward its mean variance times the identity; residuals (N, K, D) of all images.

    Sigma_s keeps the sampled Sigma_xi, which is unbiased there. The coefficient is scikit-learn's: Ledoit & Wolf 2004, or
    OAS (Chen et al. 2010), for the nu = (N-1)(K-1) rows that two-way centring leaves independent.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage, oas

    n, k = moments.num_images, moments.num_views
    sigma_xi, sigma_s = moments.covariances()
    # Within an image, K centred residuals are K - 1 independent ones: an orthonormal contrast makes them so.
    contrast = torch.linalg.qr(torch.eye(k, dtype=torch.float64) - 1 / k)[0][:, : k - 1]  # (K, K - 1)
    rows = torch.einsum("nkd,kj->njd", residuals.cpu().double(), contrast).flatten(0, 1)  # (N (K - 1), D)
    rows = (rows * (n / (n - 1)) ** 0.5).numpy()  # so that their mean square is Sigma_xi
    coefficient = (
        ledoit_wolf_shrinkage(rows, assume_centered=True) if method == "ledoit-wolf" else oas(rows, assume_centered=True)[1]
    )
    d = moments.dim
    target = sigma_xi.diagonal().mean() * torch.eye(d, dtype=torch.float64, device=sigma_xi.device)
    return InvariantSpectrum(
        sigma_invariant=sigma_s,
        sigma_residual=(1 - coefficient) * sigma_xi + coefficient * target,
        num_images=n,
        num_views=k,
        shrinkage=float(coefficient),
    )
