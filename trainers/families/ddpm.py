"""DDPM: discrete timesteps of a variance-preserving schedule, with epsilon, v or x prediction.

The network is diffusers' UNet2DModel, or its DiTTransformer2DModel as in DiT (Peebles & Xie 2023), without a learned variance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlflow_icr import SchedulerDenoiser
from trainers.config import TrainConfig
from trainers.families.base import Family
from trainers.families.dit import make_dit
from trainers.families.unet import make_unet
from trainers.options import TRANSFORMER

KINDS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}  # ours, and diffusers' words


class DDPM(Family):
    """DDPM (Ho et al. 2020), or with v prediction (Salimans & Ho 2022); a noise level is a timestep, from 0."""

    def __init__(self, config: TrainConfig, num_classes: int | None = None) -> None:
        super().__init__(config, num_classes)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _network(self, channels: int, size: tuple[int, int]) -> nn.Module:
        make = make_dit if self.config.network.kind == TRANSFORMER else make_unet
        return make(self.config, channels, size, self.num_classes)

    def scheduler(self) -> Any:
        """diffusers' DDPMScheduler."""
        from diffusers import DDPMScheduler

        noise = self.config.noise
        return DDPMScheduler(
            num_train_timesteps=noise.timesteps,
            beta_start=noise.beta_start,
            beta_end=noise.beta_end,
            beta_schedule=noise.beta_schedule,
            prediction_type=KINDS[noise.prediction],
            clip_sample=not self.config.network.autoencoder,  # images end in [-1, 1], latents do not
            timestep_spacing="trailing",  # a few steps start at pure noise too (Lin et al. 2024)
        )

    def denoiser(self, network: nn.Module) -> SchedulerDenoiser:
        """The network with its schedule."""
        return SchedulerDenoiser(network, self.scheduler(), null_class=self.null_class)

    def draw(self, generator: np.random.Generator, count: int) -> Tensor:
        """Timesteps, (count,) float32 whole numbers, uniform."""
        return torch.from_numpy(generator.integers(0, self.config.noise.timesteps, count)).float()

    def loss(self, denoiser: Any, x: Tensor, level: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean squared error of the prediction: of noise, or of v = sqrt(abar) noise - sqrt(1 - abar) x; unweighted.

        The error of a predicted x is weighted by abar / (1 - abar), which makes it the error of the noise.
        """
        if x.device not in self._tables:  # cached: to copy them there in each step would make the host wait for the device
            signals, shares = (torch.sigmoid(sign * denoiser.log_sigmas).sqrt().to(x) for sign in (-2, 2))
            self._tables[x.device] = signals, shares  # sqrt(abar) and sqrt(1 - abar), (T,)
        signal, share = (table[level.long()].view(-1, 1, 1, 1) for table in self._tables[x.device])
        predicted = denoiser.predict(signal * x + share * noise, level, labels)
        match self.config.noise.prediction:
            case "epsilon":
                return (predicted - noise).square().mean()
            case "v":
                return (predicted - (signal * noise - share * x)).square().mean()
            case _:
                return (signal / share * (predicted - x)).square().mean()

    def stock_pipeline(self, network: Any) -> Any:
        """DDPMPipeline, or one that takes classes for a U-Net of classes; None for a transformer, or classes of rectangles."""
        from diffusers import ConsistencyModelPipeline, DDPMPipeline

        if self.config.network.kind == TRANSFORMER:  # diffusers' pipeline of it wants latents and classes
            return None
        if self.null_class is None:
            return DDPMPipeline(network, self.scheduler())
        if not isinstance(network.config.sample_size, int):  # ConsistencyModelPipeline samples squares alone
            return None
        # Made for consistency models, it samples by any scheduler, and alone of diffusers' pipelines gives a U-Net classes.
        return ConsistencyModelPipeline(network, self.scheduler())
