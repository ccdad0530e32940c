"""Denoisers that cannot know the images that they are asked about: made from other images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlflow_icr.generation import optimal_denoiser


class Judge:
    """A denoiser without a network, from other images (N, C, H, W) in [-1, 1]."""

    def __init__(self, others: Tensor) -> None:
        self.network = nn.Identity()
        self.others = others

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised images (B, C, H, W)."""
        raise NotImplementedError


class KernelRegression(Judge):
    """The optimal denoiser of the other images: a weighted mean of them."""

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised images (B, C, H, W)."""
        return optimal_denoiser(x.flatten(1), float(sigma), self.others.flatten(1)).float().view_as(x)


class Wiener(Judge):
    """Linear shrinkage in the principal components of the other images, which depends on positions in an image."""

    def __init__(self, others: Tensor) -> None:
        super().__init__(others)
        flat = others.flatten(1).double()
        self.mean = flat.mean(0)
        self.variances, self.directions = torch.linalg.eigh(torch.cov(flat.T))

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised images (B, C, H, W)."""
        gains = self.variances.clamp(min=0) / (self.variances.clamp(min=0) + float(sigma) ** 2)
        shrunk = ((x.flatten(1).double() - self.mean) @ self.directions * gains) @ self.directions.T
        return (self.mean + shrunk).float().view_as(x)


class DCT(Judge):
    """Shrinkage of each coefficient of the cosine transform by its variance over the other images."""

    def __init__(self, others: Tensor) -> None:
        super().__init__(others)
        self.bases = [self._basis(side) for side in others.shape[-2:]]
        self.mean = others.mean((0, 2, 3), keepdim=True)
        self.variances = self._transform(others - self.mean).square().mean(0)

    @staticmethod
    def _basis(side: int) -> Tensor:
        k, i = torch.arange(side)[:, None].double(), torch.arange(side).double()
        basis = torch.cos(math.pi * (i + 0.5) * k / side) * (2 / side) ** 0.5
        basis[0] /= 2**0.5
        return basis.float()

    def _transform(self, x: Tensor) -> Tensor:
        return self.bases[0] @ x @ self.bases[1].T

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised images (B, C, H, W)."""
        gains = self.variances / (self.variances + float(sigma) ** 2)
        return self.mean + self.bases[0].T @ (self._transform(x - self.mean) * gains) @ self.bases[1]


JUDGES: dict[str, type[Judge]] = {"dct": DCT, "wiener": Wiener, "kernel": KernelRegression}
