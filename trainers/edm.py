"""EDM: its network, its loss and its noise (Karras et al. 2022), on diffusers' UNet2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mlflow_icr import Denoiser
from trainers.config import TrainConfig

if TYPE_CHECKING:
    from diffusers import UNet2DModel

SMALLEST_HEAD = 8  # channels of an attention head, so that narrow blocks can attend too
HEAD = 64


def build_network(config: TrainConfig, channels: int) -> UNet2DModel:
    """The U-Net of a configuration for images of some channels, initialised from the configuration's seed."""
    from diffusers import UNet2DModel

    resolutions = [config.resolution // 2**i for i in range(len(config.block_channels))]
    attends = [resolution in config.attention_resolutions for resolution in resolutions]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return UNet2DModel(
            sample_size=config.resolution,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=config.layers_per_block,
            block_out_channels=config.block_channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            norm_num_groups=min(32, min(config.block_channels) // 4),
            attention_head_dim=HEAD if min(config.block_channels) % HEAD == 0 else SMALLEST_HEAD,
            add_attention=any(attends),
            dropout=config.dropout,
        )


def training_sigma(generator: np.random.Generator, count: int, p_mean: float, p_std: float) -> Tensor:
    """Noise levels of a training batch, (count,) float32: ln sigma is normal with mean p_mean and deviation p_std."""
    return torch.from_numpy(np.exp(p_mean + p_std * generator.standard_normal(count))).float()


def edm_loss(denoiser: Denoiser, images: Tensor, sigma: Tensor, noise: Tensor, sigma_data: float) -> Tensor:
    """The mean weighted squared error of denoising images (B, C, H, W) in [-1, 1], noised by sigma (B,) times unit noise.

    The weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 makes every noise level count alike at initialisation.
    """
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    denoised = denoiser(images + sigma.view(-1, 1, 1, 1) * noise, sigma)
    return (weight.view(-1, 1, 1, 1) * (denoised - images).square()).mean()
