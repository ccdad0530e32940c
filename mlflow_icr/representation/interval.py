"""The confidence interval of an ICR, from one number for each image, without resampling.

Each image is left out of the residual covariance by which its own mean and residuals are measured. With A the inverse of
Sigma_xi without image n, and t[n], r[n, k] centred, three terms of each image suffice, each in O(K D^2):

    between[n] = t[n]' A t[n] / D                             estimates  m tr(Sigma_xi^-1 Sigma_t) / D
    within[n]  = sum_k r[n,k]' A r[n,k] / ((K-1) D)           estimates  m, the factor by which a sampled inverse is too large
    spread[n]  = sum_k r[n,k]' A Sigma_t A r[n,k] / ((K-1) D) is the effect of n's residuals on the inverse

m is (nu)/(nu - D - 1) for Gaussian features, which is what `InvariantSpectrum.icr_debiased` divides by, and larger where
residuals have heavy tails. Here it is measured, so mean(between) / mean(within) - 1 / K is a mean eigenvalue without the
plug-in's bias for any features whose residuals are scale mixtures of Gaussians (multivariate t among them). Leaving an image
out is exact and cheap: it removes K rows from the scatter, a K x K update of the inverse (Sherman, Morrison & Woodbury).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlflow_icr.representation.moments import ViewMoments
from mlflow_icr.representation.quantile import student_t
from mlflow_icr.representation.spectrum import SMALLEST_PIVOT, InvariantSpectrum

CHUNK = 2**24  # float64 numbers held at a time, 128 MiB


@dataclass(frozen=True, eq=False)
class ICRInterval:
    """A debiased ICR with its confidence interval and the influence of each image.

    `value` is the closed-form debiased ICR, exact for Gaussian features; `centre` is the leave-one-image-out estimate, around
    which the interval from `low` to `high` is built, then widened to hold `value`; `standard_error` is that of `centre`;
    `influence` (N,) float64 is how much each image raises the ICR: its mean is 0, its deviation over sqrt(N) the standard
    error. All are in units of ICR. Source: `docs/built/formulas.md`.
    """

    value: float
    low: float
    high: float
    standard_error: float
    influence: Tensor
    centre: float
    level: float


def leave_one_out_terms(moments: ViewMoments, features: Tensor) -> Tensor:
    """between, within and spread of some images, (B, 3) float64, for features (B, K, D) that `moments` were updated with.

    Any part of the images will do, so that ranks and batches can share the work. Where the residual covariance is singular
    without an image (a channel fires in it alone), its terms are NaN. Raises ValueError when it is singular with all images.
    """
    spectrum = moments.spectrum()
    n, k, d = moments.num_images, moments.num_views, moments.dim
    nu, nu_without = (n - 1) * (k - 1), (n - 2) * (k - 1)
    if nu_without < d:
        raise ValueError(f"needs (N-2)(K-1) >= D to leave an image out; N = {n}, K = {k} give {nu_without}, D = {d}")
    inverse = spectrum.inverse_residual  # (D, D)
    sigma_t = spectrum.sigma_invariant + spectrum.sigma_residual / k
    grow = n / (n - 1)  # an image is n / (n - 1) times as far from the mean of the others as from the mean of all
    eye = torch.eye(k, dtype=torch.float64, device=inverse.device)
    parts = []
    for h in features.split(max(1, CHUNK // (k * d))):
        t, r = moments.centred(h)  # (B, D), (B, K, D)
        ra = r @ inverse  # (B, K, D)
        gram = ra @ r.mT  # (B, K, K)
        complement = eye - gram * (grow / nu)  # I - leverage, (B, K, K)
        singular = torch.linalg.eigvalsh((complement + complement.mT) / 2)[:, 0] < SMALLEST_PIVOT**0.5
        complement[singular] = eye
        keep = torch.linalg.inv(complement)
        cross = ra @ t[:, :, None]  # (B, K, 1)
        between = ((t @ inverse) * t).sum(1) + (cross.mT @ keep @ cross)[:, 0, 0] * (grow / nu)
        within = (gram @ keep).diagonal(dim1=1, dim2=2).sum(1) / (k - 1)
        spread = (keep @ (ra @ sigma_t @ ra.mT) @ keep).diagonal(dim1=1, dim2=2).sum(1) / (k - 1)
        terms = torch.stack([between, within, spread], 1) * (grow * nu_without / nu / d)
        terms[singular] = torch.nan
        parts.append(terms)
    return torch.cat(parts) if parts else torch.empty(0, 3, dtype=torch.float64, device=inverse.device)


def interval_from_terms(spectrum: InvariantSpectrum, terms: Tensor, level: float = 0.95) -> ICRInterval:
    """The interval of a spectrum from the `leave_one_out_terms` of all its N images, (N, 3), in their order.

    Raises ValueError when the spectrum has no debiased ICR, saying why, when an image cannot be left out, or for a level
    outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1, such as 0.95")
    value = spectrum.icr_debiased
    if value is None:
        raise ValueError(spectrum.unavailable["icr_debiased"])
    indispensable = (~terms.isfinite().all(1)).nonzero()[:, 0].tolist()
    if indispensable:
        raise ValueError(
            f"Sigma_xi is singular without image {indispensable[0]}, which alone moves one of its dimensions"
            + (f" (and so do {len(indispensable) - 1} more)" if len(indispensable) > 1 else "")
        )
    n, k = spectrum.num_images, spectrum.num_views
    between, within, spread = terms.unbind(1)
    inflation = within.mean()
    total = between.mean() / inflation  # tr(Sigma_xi^-1 Sigma_t) / D
    # The derivative of `total` at each image is a difference of two parts with mean `total`: the image's term between images,
    # and the effect of its residuals on the inverse. A sampled Sigma_t has more spread eigenvalues than the true one: with W
    # whitened Sigma_t, E tr(W_hat^2) = tr(W^2) + tr(W)^2 / (N - 1), so that the second part would vary too much.
    whitened = spectrum.whitened_means
    noise = float(whitened.diagonal().sum().square() / whitened.square().sum()) / (n - 1)
    slope = (between / inflation - total) - (spread * (total / spread.mean()) - total) * max(0.0, 1 - noise) ** 0.5
    eigenvalue = float(total) - 1 / k
    error = float(slope.std()) / n**0.5
    reach = student_t(level, n - 1) * error

    def ratio(mean_eigenvalue: float) -> float:
        return 1 / (1 + max(0.0, mean_eigenvalue))

    centre = ratio(eigenvalue)
    return ICRInterval(
        value=value,
        low=min(value, ratio(eigenvalue + reach)),
        high=max(value, ratio(eigenvalue - reach)),
        standard_error=centre**2 * error,
        influence=-(centre**2) * slope,
        centre=centre,
        level=level,
    )


def icr_interval(features: Tensor, level: float = 0.95) -> ICRInterval:
    """The debiased ICR of features (N, K, D) with its confidence interval and the influence of every image on it.

    Costs O(N K D^2), without resampling. Raises ValueError for wrong shapes, a level outside (0, 1), and for features too
    few for a debiased value: (N-2)(K-1) >= D and (N-1)(K-1) > D + 1 are needed.
    """
    if features.ndim != 3:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (N, K, D): images, views, dimensions")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a number between 0 and 1, such as 0.95")
    moments = ViewMoments(features.shape[1], features.shape[2]).update(features)
    spectrum = moments.spectrum()
    if spectrum.icr_debiased is None:
        raise ValueError(f"icr_debiased {spectrum.unavailable['icr_debiased']}")
    return interval_from_terms(spectrum, leave_one_out_terms(moments, features), level)


def paired_difference(influence_a: Tensor, influence_b: Tensor, difference: float, level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of `difference`, ICR b less ICR a of the same N images and views, from both influences (N,).

    Effects that both have in common (a hard image is hard at both steps) cancel. Raises ValueError for different lengths.
    """
    if influence_a.shape != influence_b.shape or influence_a.ndim != 1:
        raise ValueError(
            f"influences have shapes {tuple(influence_a.shape)} and {tuple(influence_b.shape)}; expected the same images"
        )
    n = len(influence_a)
    reach = student_t(level, n - 1) * float((influence_b.double() - influence_a.double()).std()) / n**0.5
    return difference - reach, difference + reach
