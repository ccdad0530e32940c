"""Mergeable second moments of features that come as several views of each image.

Every image n < N is seen in the same K views, h[n, k] in R^D. The Invariant Contamination Ratio needs only two scatter
matrices, and both merge exactly over batches and ranks (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample
variance"):

- between images: t[n] = mean_k h[n, k],                 S_t  = sum_n  (t[n] - mean t)(t[n] - mean t)'
- within images:  e[n, k] = h[n, k] - t[n],              S_xi = sum_nk (e[n, k] - mean_n e[:, k])(...)'

The second one is the two-way centred residual r[n, k] = h[n, k] - mean_k h[n, :] - mean_n h[:, k] + mean h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlflow_icr.representation.spectrum import InvariantSpectrum

CHUNK = 2**22  # float64 numbers made at a time, 32 MiB


def as_double(x: Tensor) -> Tensor:
    """A tensor as float64, without its gradient, on its own device, or on the CPU where that (MPS) has no float64."""
    return (x.detach().cpu() if x.device.type == "mps" else x.detach()).double()


class ViewMoments:
    """Sufficient statistics of (N, K, D) features in float64 and O(D^2) memory, whatever N.

    Raises ValueError for num_views < 2, dim < 1, and in `update` for wrong shapes or values that are not finite.
    Source: Li et al. 2026, appendix B.6, for K = 2; the two-way layout extends it to any K.
    """

    def __init__(self, num_views: int, dim: int) -> None:
        if num_views < 2:
            raise ValueError(f"num_views is {num_views}; residuals need at least 2 views of each image")
        if dim < 1:
            raise ValueError(f"dim is {dim}; features need at least 1 dimension")
        self.num_views = num_views
        self.dim = dim
        self.num_images = 0
        self._mean_image = torch.zeros(dim, dtype=torch.float64)  # (D,)   mean_n t[n]
        self._mean_offset = torch.zeros(num_views, dim, dtype=torch.float64)  # (K, D) mean_n e[n, k]
        self._scatter_image = torch.zeros(dim, dim, dtype=torch.float64)  # (D, D) S_t
        self._scatter_residual = torch.zeros(dim, dim, dtype=torch.float64)  # (D, D) S_xi

    def update(self, features: Tensor) -> ViewMoments:
        """Add the features of B more images, shape (B, K, D), any float dtype; returns self.

        Raises ValueError when the shape is not (B, num_views, dim) or a value is not finite.
        """
        if features.ndim != 3 or features.shape[1:] != (self.num_views, self.dim):
            raise ValueError(
                f"features have shape {tuple(features.shape)}; expected (B, {self.num_views}, {self.dim}): "
                "images, views, feature dimensions"
            )
        if not features.is_floating_point():
            raise ValueError(f"features have dtype {features.dtype}; expected a floating-point dtype")
        if features.shape[0] == 0:
            return self
        finite = torch.isfinite(features).flatten(1).all(1)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise ValueError(f"features hold NaN or Inf in {bad} of {len(features)} images; expected finite values")
        for part in features.split(max(1, CHUNK // (self.num_views * self.dim))):
            self._add(as_double(part))
        return self

    def _add(self, h: Tensor) -> None:
        """Add finite features (B, K, D) float64."""
        t = h.mean(1)  # (B, D)
        e = h - t[:, None]  # (B, K, D)
        batch = ViewMoments.__new__(ViewMoments)
        batch.num_views, batch.dim, batch.num_images = self.num_views, self.dim, h.shape[0]
        batch._mean_image = t.mean(0)
        batch._mean_offset = e.mean(0)
        t_centred = t - batch._mean_image
        e_centred = (e - batch._mean_offset).flatten(0, 1)  # (B K, D)
        batch._scatter_image = t_centred.T @ t_centred
        batch._scatter_residual = e_centred.T @ e_centred
        self.merge(batch)

    def merge(self, other: ViewMoments) -> ViewMoments:
        """Add another set of moments, as if its images had been given to this one; returns self.

        Raises ValueError when views or dimensions differ.
        """
        if (other.num_views, other.dim) != (self.num_views, self.dim):
            raise ValueError(
                f"cannot merge moments of {other.num_views} views and {other.dim} dimensions "
                f"into moments of {self.num_views} views and {self.dim} dimensions"
            )
        if other.num_images == 0:
            return self
        if self.num_images == 0:
            self.to(other._mean_image.device)
        device = self._mean_image.device
        total = self.num_images + other.num_images
        share = other.num_images / total
        weight = self.num_images * share
        shift_image = other._mean_image.to(device) - self._mean_image  # (D,)
        shift_offset = other._mean_offset.to(device) - self._mean_offset  # (K, D)
        self._scatter_image = (
            self._scatter_image + other._scatter_image.to(device) + weight * torch.outer(shift_image, shift_image)
        )
        self._scatter_residual = (
            self._scatter_residual + other._scatter_residual.to(device) + weight * (shift_offset.T @ shift_offset)
        )
        self._mean_image = self._mean_image + share * shift_image
        self._mean_offset = self._mean_offset + share * shift_offset
        self.num_images = total
        return self

    def centred(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Image means (B, D) and two-way centred residuals (B, K, D), float64, of some of the images seen, (B, K, D)."""
        h = as_double(features).to(self._mean_image.device)
        t = h.mean(1)
        return t - self._mean_image, h - t[:, None] - self._mean_offset

    def to(self, device: torch.device | str) -> ViewMoments:
        """Move the statistics to a device; returns self."""
        for name in ("_mean_image", "_mean_offset", "_scatter_image", "_scatter_residual"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def all_reduce(self) -> ViewMoments:
        """Replace each rank's moments by those of all ranks together, the same on every rank; returns self.

        Does nothing outside torch.distributed. Ranks may hold different numbers of images, also none.
        """
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        home = self._mean_image.device
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else home
        self.to(device)

        n = self.num_images
        first = torch.cat([self._mean_offset, self._mean_image[None]]) * n  # (K + 1, D)
        count = torch.tensor([float(n)], dtype=torch.float64, device=device)
        dist.all_reduce(count)
        dist.all_reduce(first)
        total = int(count.item())
        if total == 0:
            return self.to(home)
        mean_offset, mean_image = first[:-1] / total, first[-1] / total

        # sum over ranks of S_r + n_r (m_r - m)(m_r - m)' is the scatter of all images: no rank's sum is ever uncentred.
        shift_image, shift_offset = self._mean_image - mean_image, self._mean_offset - mean_offset
        scatter = torch.stack(
            [
                self._scatter_image + n * torch.outer(shift_image, shift_image),
                self._scatter_residual + n * (shift_offset.T @ shift_offset),
            ]
        )
        dist.all_reduce(scatter)
        self.num_images = total
        self._mean_image, self._mean_offset = mean_image, mean_offset
        self._scatter_image, self._scatter_residual = scatter[0], scatter[1]
        return self.to(home)

    def covariances(self) -> tuple[Tensor, Tensor]:
        """Sigma_xi and Sigma_s, (D, D) each. Raises ValueError for fewer than 2 images."""
        n, k = self.num_images, self.num_views
        if n < 2:
            raise ValueError(f"{n} image(s) seen; a covariance over images needs at least 2")
        sigma_xi = self._scatter_residual / ((n - 1) * (k - 1))
        return sigma_xi, self._scatter_image / (n - 1) - sigma_xi / k

    def spectrum(self, ridge: float = 0.0) -> InvariantSpectrum:
        """The invariant spectrum of the features seen so far, with `ridge` added to the residual covariance.

        Raises ValueError for fewer than 2 images, a negative ridge, or a singular residual covariance.
        """
        sigma_xi, sigma_s = self.covariances()
        return InvariantSpectrum(
            sigma_invariant=sigma_s,
            sigma_residual=sigma_xi,
            num_images=self.num_images,
            num_views=self.num_views,
            ridge=ridge,
        )


def principal_directions(moments: ViewMoments, count: int) -> Tensor:
    """The `count` directions of largest variance of the image means, (D, count), orthonormal columns.

    Raises ValueError unless 1 <= count <= D, and for fewer than 2 images.
    """
    if not 1 <= count <= moments.dim:
        raise ValueError(f"projection is {count}; expected 1 to {moments.dim}, the width of the layer")
    sigma_xi, sigma_s = moments.covariances()
    vectors = torch.linalg.eigh(sigma_s + sigma_xi / moments.num_views)[1].flip(1)[:, :count]
    # An eigenvector's sign is arbitrary: its largest entry is made positive.
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def icr(features: Tensor, ridge: float = 0.0) -> InvariantSpectrum:
    """The invariant spectrum of features (N, K, D): N images, K >= 2 views of each, D dimensions; read `.icr` from it.

    Raises ValueError for wrong shapes, N < 2, K < 2, values that are not finite, or a singular residual covariance.
    Source: Li et al. 2026, equations 3 to 5.
    """
    if features.ndim != 3:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (N, K, D): images, views, dimensions")
    return ViewMoments(features.shape[1], features.shape[2]).update(features).spectrum(ridge)
