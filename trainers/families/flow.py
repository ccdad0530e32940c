"""Flow matching as in SiT (Ma et al. 2024), on diffusers' DiTTransformer2DModel.

The interpolant is linear, x_t = (1 - t) x + t noise, and the network learns its velocity, noise - x, at t uniform in [0, 1].
t is the share of noise, as in SiT's paper; the network gets 1000 t, as from diffusers' flow-matching schedulers, where SiT's
code gives it t. Unlike diffusers, SiT shares the embedding of time and class between its blocks: so does the network here, and
a saved one has a copy in each block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlflow_icr.extraction.flow import FlowDenoiser
from trainers.families.base import Family
from trainers.families.dit import make_dit


class Flow(Family):
    """Flow matching; a noise level is a time t in [0, 1]."""

    def _network(self, channels: int, size: tuple[int, int]) -> nn.Module:
        return make_dit(self.config, channels, size, self.num_classes)

    def denoiser(self, network: nn.Module) -> FlowDenoiser:
        """The network as a denoiser."""
        return FlowDenoiser(network, null_class=self.null_class)

    def draw(self, generator: np.random.Generator, count: int) -> Tensor:
        """Times, (count,) float32 in [0, 1]: uniform, or logit-normal, and shifted (Esser et al. 2024, sections 3.1, 5.3.2)."""
        noise = self.config.noise
        if noise.time_distribution == "logit_normal":
            t = 1 / (1 + np.exp(-(noise.time_mean + noise.time_std * generator.standard_normal(count))))
        else:
            t = generator.random(count)
        return torch.from_numpy(noise.time_shift * t / (1 + (noise.time_shift - 1) * t)).float()

    def loss(self, denoiser: Any, x: Tensor, level: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean squared error of the velocity; unweighted."""
        t = level.view(-1, 1, 1, 1)
        return (denoiser.velocity((1 - t) * x + t * noise, level, labels) - (noise - x)).square().mean()

    def scheduler(self) -> Any:
        """diffusers' Euler solver, whose sigma is our t."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler()
