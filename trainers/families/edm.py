"""EDM: preconditioning, noise and loss of Karras et al. 2022, on diffusers' UNet2DModel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlflow_icr import EDMDenoiser
from trainers.families.base import Family
from trainers.families.unet import make_unet


def training_sigma(generator: np.random.Generator, count: int, p_mean: float, p_std: float) -> Tensor:
    """Noise levels of a training batch, (count,) float32: ln sigma is normal with mean p_mean and deviation p_std."""
    return torch.from_numpy(np.exp(p_mean + p_std * generator.standard_normal(count))).float()


def edm_loss(
    denoiser: Any, images: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float, labels: Tensor | None = None
) -> Tensor:
    """The mean weighted squared error of denoising images (B, C, H, W) in [-1, 1], noised by sigma (B,) times unit noise.

    The weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 makes every noise level count alike at initialisation.
    """
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    noised, conditions = images + sigma.view(-1, 1, 1, 1) * noise, {} if labels is None else {"labels": labels}
    denoised = denoiser(noised, sigma, **conditions)
    return (weight.view(-1, 1, 1, 1) * (denoised - images).square()).mean()


class EDM(Family):
    """EDM; a noise level is sigma."""

    @property
    def sigma_data(self) -> float:
        """The standard deviation of the training inputs; a run measures it if its configuration does not give it."""
        assert self.config.noise.sigma_data is not None, "sigma_data is measured before a family is made"
        return self.config.noise.sigma_data

    def _network(self, channels: int, size: tuple[int, int]) -> nn.Module:
        return make_unet(self.config, channels, size, self.num_classes)

    def denoiser(self, network: nn.Module) -> EDMDenoiser:
        """EDM's preconditioning around a network."""
        return EDMDenoiser(network, self.sigma_data, null_class=self.null_class)

    def draw(self, generator: np.random.Generator, count: int) -> Tensor:
        """sigma, (count,) float32, log-normal."""
        return training_sigma(generator, count, self.config.noise.p_mean, self.config.noise.p_std)

    def loss(self, denoiser: Any, x: Tensor, level: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted denoising error at sigma."""
        return edm_loss(denoiser, x, level, noise, self.sigma_data, labels)

    def scheduler(self) -> Any:
        """diffusers' own solver for EDM; it has no Heun."""
        from diffusers import EDMDPMSolverMultistepScheduler

        return EDMDPMSolverMultistepScheduler(sigma_data=self.sigma_data)

    def stock_pipeline(self, network: Any) -> Any:
        """diffusers' pipeline of consistency models, which samples by any scheduler; None for other than squares."""
        from diffusers import ConsistencyModelPipeline

        if not isinstance(network.config.sample_size, int):
            return None
        # Plain diffusers loads and samples this; with DDPMPipeline it would run and be wrong.
        return ConsistencyModelPipeline(unet=network, scheduler=self.scheduler())
