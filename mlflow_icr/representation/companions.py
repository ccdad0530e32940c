"""Other measures of a representation, to be read beside ICR, by tensor maths alone.

Each takes features (N, K, D), N images in K views, of any float dtype, computes in float64 and returns a float.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mlflow_icr.representation.moments import as_double

RANKME_EPSILON = 1e-7  # of Garrido et al. 2023, equation 2
LIDAR_DELTA = 1e-4  # of Thilak et al. 2024, section 4: added to the diagonal of the within-image covariance
CHUNK = 2**24  # float64 numbers held at a time, 128 MiB


def check_views(features: Tensor) -> Tensor:
    """Features (N, K, D) as float64. Raises ValueError for other shapes, N < 2, K < 2 or values that are not finite."""
    if features.ndim != 3 or features.shape[0] < 2 or features.shape[1] < 2 or features.shape[2] < 1:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (N, K, D) with N >= 2 images, K >= 2 views")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features hold NaN or Inf; expected finite values")
    return as_double(features)


def _entropy_rank(shares: Tensor) -> float:
    """exp of the entropy of shares that sum to about 1; 0 log 0 = 0."""
    return float(torch.special.entr(shares).sum().exp())


def alignment(features: Tensor) -> float:
    """Mean squared distance between two views of one image, features l2-normalised; 0 is perfect.

    Source: Wang & Isola 2020, "Understanding contrastive representation learning", alpha = 2, over all pairs of views.
    """
    z = normalize(check_views(features), dim=-1)
    k = z.shape[1]
    # The mean over pairs k != l of |z_k - z_l|^2 is twice the variance over views with divisor K - 1.
    return float(2 * (z - z.mean(1, keepdim=True)).square().sum((1, 2)).mean() / (k - 1))


def uniformity(features: Tensor) -> float:
    """log mean exp(-2 |z_i - z_j|^2) over pairs of different images in the same view, l2-normalised; lower is more uniform.

    Source: Wang & Isola 2020, t = 2.
    """
    z = normalize(check_views(features), dim=-1)
    n, k = z.shape[:2]
    total = z.new_zeros(())
    for view in z.unbind(1):
        for rows in view.split(max(1, CHUNK // n)):
            total += (-2 * torch.cdist(rows, view).square()).exp().sum()
    return float(((total - n * k) / (n * (n - 1) * k)).log())


def rankme(features: Tensor) -> float:
    """exp of the entropy of the singular values of the feature matrix, all views as rows, from 1 to D.

    Source: Garrido et al. 2023, "RankMe", equations 1 and 2; features as they are, not centred.
    """
    values = torch.linalg.svdvals(check_views(features).flatten(0, 1))
    return _entropy_rank(values / values.sum() + RANKME_EPSILON)


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of the features' covariance, all views as rows, from 1 to D.

    Source: Roy & Vetterli 2007, "The effective rank", of the covariance matrix.
    """
    x = check_views(features).flatten(0, 1)
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).clamp(min=0)
    return _entropy_rank(values / values.sum())


def lidar(features: Tensor) -> float:
    """Effective rank of the linear discriminant of images: of Sigma_w^-1/2 Sigma_b Sigma_w^-1/2, from 1 to D.

    Source: Thilak et al. 2024, "LiDAR", with every image a class and its views the samples.
    """
    x = check_views(features)
    n, k, d = x.shape
    centres = x.mean(1)  # (N, D)
    within = (x - centres[:, None]).flatten(0, 1)
    sigma_w = within.T @ within / (n * k) + LIDAR_DELTA * torch.eye(d, dtype=x.dtype, device=x.device)
    between = centres - centres.mean(0)
    factor = torch.linalg.cholesky(sigma_w)
    half = torch.linalg.solve_triangular(factor, between.T, upper=False)  # (D, N)
    # L^-1 Sigma_b L^-T has the eigenvalues of the symmetric form.
    values = torch.linalg.eigvalsh(half @ half.T / n).clamp(min=0)
    return _entropy_rank(values / values.sum() + RANKME_EPSILON)


def feature_deviation(features: Tensor) -> float:
    """Mean over images of the deviation of features over the D dimensions, l2-normalised: 0 is balanced, 1 / sqrt(D) spiky.

    Source: Zhang et al. 2025, "Generalization of diffusion models arises with a balanced representation space", arXiv
    2512.20963, which does not normalise features; normalised, the deviation has no unit.
    """
    return float(normalize(check_views(features), dim=-1).std(-1, correction=0).mean())


def stable_rank(weights: Sequence[Tensor]) -> float:
    """Mean of |W|_F^2 / |W|_2^2 over weights (out, ...), each as a matrix of `out` rows, from 1 to its rank.

    Raises ValueError for no weights, or some that are all 0 or not finite.
    """
    if not weights:
        raise ValueError("weights is empty; expected at least one matrix")
    ranks = []
    for weight in weights:
        values = torch.linalg.svdvals(weight.detach().flatten(1).cpu().double())
        if not (bool(torch.isfinite(values).all()) and float(values.max()) > 0):
            raise ValueError("weights are 0 or not finite; expected finite matrices")
        ranks.append(float((values / values.max()).square().sum()))
    return sum(ranks) / len(ranks)


def variability_ratio(features: Tensor, labels: Tensor | None = None) -> float:
    """Within-class variability collapse, tr(Sigma_W pinv(Sigma_B)) / C: 0 when each class has collapsed to a point.

    Without labels (N,) every image is a class and its views the samples (C = N); with them each class holds all views of
    its images. Source: Papyan, Han & Donoho 2020, "Prevalence of neural collapse", NC1.
    """
    x = check_views(features)
    n, k, d = x.shape
    groups = torch.arange(n, device=x.device) if labels is None else check_labels(labels, n).to(x.device)
    _, member, counts = groups.unique(return_inverse=True, return_counts=True)
    classes = len(counts)
    if classes < 2:
        raise ValueError(f"labels name {classes} class; expected at least 2")
    sums = x.new_zeros(classes, d).index_add_(0, member, x.sum(1))
    centres = sums / (counts * k)[:, None]
    within = (x - centres[member][:, None]).flatten(0, 1)
    between = centres - x.mean((0, 1))
    sigma_w, sigma_b = within.T @ within / (n * k), between.T @ between / classes
    return float((sigma_w @ torch.linalg.pinv(sigma_b, hermitian=True)).diagonal().sum() / classes)


def check_labels(labels: Tensor, count: int) -> Tensor:
    """Labels (count,) of integers. Raises ValueError for other shapes or dtypes."""
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; expected ({count},) integers, one an image"
        )
    return labels


def class_separation(features: Tensor, labels: Tensor) -> float:
    """R^2 of classes in cosine distance, 1 - mean within-class distance / mean distance: 1 when classes are points.

    Source: Kornblith et al. 2021, "Why do better loss functions lead to less transferable features?", equation 11; all views
    of an image are samples of its class.
    """
    z = normalize(check_views(features), dim=-1)
    member = check_labels(labels, len(z)).to(z.device).unique(return_inverse=True)[1]
    classes = int(member.max()) + 1
    # Mean cosine similarity of two sets is the product of their mean directions.
    means = z.new_zeros(classes, z.shape[2]).index_add_(0, member, z.mean(1)) / member.bincount()[:, None]
    similarity = means @ means.T
    return float(1 - (1 - similarity.diagonal().mean()) / (1 - similarity.mean()))
