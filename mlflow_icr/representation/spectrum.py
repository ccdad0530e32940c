"""The invariant spectrum: how much of each feature direction is shared by all views of an image.

Sigma_s v_i = lambda_i Sigma_xi v_i is solved through one Cholesky factor, Sigma_xi + ridge I = L L':
M = L^-1 Sigma_s L^-T is symmetric, has the lambda_i as its eigenvalues, and v_i = L^-T u_i. Its trace alone gives ICR, so
eigenvalues and eigenvectors are only computed on first use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

# A pivot of the residual *correlation* matrix is the share of a channel's residual variance that the channels before it
# do not explain. Below this the inverse is rounding noise: D = 10^3 float64 operations leave about 1e-13 of it.
SMALLEST_PIVOT = 1e-12


@dataclass(frozen=True, eq=False)
class InvariantSpectrum:
    """Invariant and residual covariance of some features, and the values that follow from the two.

    `sigma_invariant` and `sigma_residual` are (D, D) float64; `num_images` is N, `num_views` is K; `shrinkage` is the share by
    which sigma_residual was shrunk toward the identity before.
    Raises ValueError for a negative ridge and for a singular residual covariance (after adding the ridge).
    Source: Li et al. 2026, equations 3 to 5; the debiased value is ours (`docs/built/formulas.md`).
    """

    sigma_invariant: Tensor
    sigma_residual: Tensor
    num_images: int
    num_views: int
    ridge: float = 0.0
    shrinkage: float = 0.0
    _cholesky: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError(f"ridge is {self.ridge}; expected 0 or a positive number")
        object.__setattr__(self, "_cholesky", self._factor())

    def _factor(self) -> Tensor:
        """The Cholesky factor L of Sigma_xi + ridge I, (D, D), refused where it would be rounding noise."""
        n, k, d = self.num_images, self.num_views, self.dim
        remedy = "use more images or views, another layer, or ridge > 0"
        if self.ridge == 0 and self.shrinkage == 0 and self.degrees_of_freedom < d:
            raise ValueError(
                f"Sigma_xi is singular: {n} images in {k} views give (N-1)(K-1) = {self.degrees_of_freedom} degrees of "
                f"freedom for D = {d} dimensions; {remedy}"
            )
        regular = self.sigma_residual + self.ridge * torch.eye(d, dtype=torch.float64, device=self.sigma_residual.device)
        scale = regular.diagonal().sqrt()  # (D,)
        constant = int((scale == 0).sum())
        if constant:
            raise ValueError(f"Sigma_xi is singular: {constant} of {d} dimensions are the same in all views; {remedy}")
        # Factoring the correlation matrix makes the test for singularity independent of the channels' units.
        factor, info = torch.linalg.cholesky_ex(regular / scale / scale[:, None])
        if int(info) or float(factor.diagonal().square().min()) < SMALLEST_PIVOT:
            raise ValueError(f"Sigma_xi is singular: some of the {d} dimensions are combinations of others; {remedy}")
        return factor * scale[:, None]

    @property
    def dim(self) -> int:
        """D, the number of feature dimensions."""
        return int(self.sigma_residual.shape[0])

    @property
    def degrees_of_freedom(self) -> int:
        """nu = (N - 1)(K - 1), the degrees of freedom of the residual covariance."""
        return (self.num_images - 1) * (self.num_views - 1)

    @cached_property
    def inverse_residual(self) -> Tensor:
        """(Sigma_xi + ridge I)^-1, (D, D)."""
        return torch.cholesky_inverse(self._cholesky)

    @cached_property
    def _whitened(self) -> Tensor:
        """M = L^-1 Sigma_s L^-T, (D, D), symmetric."""
        half = torch.linalg.solve_triangular(self._cholesky, self.sigma_invariant, upper=False)
        whole = torch.linalg.solve_triangular(self._cholesky, half.T, upper=False)
        return (whole + whole.T) / 2

    @property
    def whitened_means(self) -> Tensor:
        """L^-1 Sigma_t L^-T, (D, D), for the covariance Sigma_t = Sigma_s + Sigma_xi / K of image means, and ridge 0."""
        eye = torch.eye(self.dim, dtype=torch.float64, device=self.sigma_residual.device)
        return self._whitened + eye / self.num_views

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self._whitened)
        return values.flip(0), vectors.flip(1)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """lambda_i, (D,), descending: invariant over residual variance along each Fisher direction; may be negative."""
        if "_eigen" in self.__dict__:
            return self._eigen[0]
        return torch.linalg.eigvalsh(self._whitened).flip(0)

    @cached_property
    def directions(self) -> Tensor:
        """Fisher directions v_i as columns, (D, D), of unit Euclidean length, in the order of `eigenvalues`."""
        v = torch.linalg.solve_triangular(self._cholesky.T, self._eigen[1], upper=True)
        return v / v.norm(dim=0)

    @cached_property
    def mean_eigenvalue(self) -> float:
        """(1/D) sum_i lambda_i = tr(Sigma_xi^-1 Sigma_s) / D."""
        return float(self._whitened.diagonal().sum()) / self.dim

    @property
    def icr(self) -> float:
        """Invariant Contamination Ratio, 1 / (1 + mean eigenvalue): the plug-in value, low is clean (equation 5)."""
        return 1 / (1 + self.mean_eigenvalue)

    @property
    def icr_debiased(self) -> float | None:
        """ICR without the plug-in's small-sample bias (exact for Gaussian features); None where `unavailable` says why."""
        if "icr_debiased" in self.unavailable:
            return None
        nu, d, k = self.degrees_of_freedom, self.dim, self.num_views
        # tr(Sigma_xi^-1 Sigma_t)/D is mean_eigenvalue + 1/K, and E[inv(Sigma_xi_hat)] = nu/(nu-D-1) inv(Sigma_xi).
        mean_eigenvalue = (nu - d - 1) / nu * (self.mean_eigenvalue + 1 / k) - 1 / k
        return 1 / (1 + max(0.0, mean_eigenvalue))

    @property
    def unavailable(self) -> dict[str, str]:
        """The values that cannot be computed from these features, each with its reason."""
        reasons = {}
        nu, d = self.degrees_of_freedom, self.dim
        if self.shrinkage > 0:
            reasons["icr_debiased"] = f"the correction holds without shrinkage; Sigma_xi is shrunk by {self.shrinkage:.3g}"
        elif self.ridge > 0:
            reasons["icr_debiased"] = f"the correction holds for ridge = 0; ridge is {self.ridge:g}"
        elif nu <= d + 1:
            reasons["icr_debiased"] = (
                f"needs (N-1)(K-1) > D + 1; N = {self.num_images}, K = {self.num_views} give {nu}, D = {d}"
            )
        return reasons

    @property
    def trace_invariant(self) -> float:
        """Tr(Sigma_s), the energy that all views of an image share; features squared."""
        return float(self.sigma_invariant.diagonal().sum())

    @property
    def trace_residual(self) -> float:
        """Tr(Sigma_xi), the energy that differs between the views of an image; features squared."""
        return float(self.sigma_residual.diagonal().sum())

    def _energy(self, sigma: Tensor) -> float:
        return float((self.directions * (sigma @ self.directions)).sum(0).mean())

    @cached_property
    def fisher_residual_energy(self) -> float:
        """mean_i v_i' Sigma_xi v_i over unit-length Fisher directions; features squared."""
        return self._energy(self.sigma_residual)

    @cached_property
    def fisher_invariant_energy(self) -> float:
        """mean_i v_i' Sigma_s v_i over unit-length Fisher directions; features squared."""
        return self._energy(self.sigma_invariant)

    def fisher_residual_growth(self, reference: InvariantSpectrum) -> float:
        """tr(Sigma_xi(reference)^-1 Sigma_xi) / D: 1 where two samples share a residual covariance, above 1 after growth.

        The samples must be of different images: a sampled inverse is too large by nu / (nu - D - 1), which is divided out
        (without ridge and shrinkage, where nu > D + 1). Raises ValueError when the two spectra differ in dimension.
        """
        if reference.dim != self.dim:
            raise ValueError(f"the reference has {reference.dim} dimensions, this spectrum {self.dim}")
        sigma = self.sigma_residual.to(reference._cholesky.device)
        nu, d = reference.degrees_of_freedom, reference.dim
        sampled = reference.ridge == 0 and reference.shrinkage == 0 and nu > d + 1
        inflation = nu / (nu - d - 1) if sampled else 1.0
        return float(torch.cholesky_solve(sigma, reference._cholesky).diagonal().sum()) / d / inflation

    @property
    def indefinite_fraction(self) -> float:
        """The share of eigenvalues below 0: Sigma_s = Sigma_t - Sigma_xi / K need not be positive in a sample."""
        return float((self.eigenvalues < 0).double().mean())
