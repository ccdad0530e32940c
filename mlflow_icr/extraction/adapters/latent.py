"""Latents: a denoiser that works on what an autoencoder makes of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import Denoiser, evaluating

# Images of this many pixels go through the autoencoder at a time: four of 512 x 512, some 6 GB of activations in float32.
PIXELS_AT_ONCE = 2**20


class LatentDenoiser:
    """A denoiser of latents, with the autoencoder (diffusers' AutoencoderKL) whose latents they are.

    `encode` gives the mean of the posterior, shifted and scaled as the autoencoder's config says: views differ by what was
    drawn for them, and by nothing else.
    """

    def __init__(self, denoiser: Denoiser, autoencoder: nn.Module) -> None:
        self._denoiser = denoiser
        self.autoencoder: Any = autoencoder
        config: Any = self.autoencoder.config
        self.scale = float(getattr(config, "scaling_factor", None) or 1.0)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)  # pixels a side of one latent

    @property
    def network(self) -> nn.Module:
        """The network that a call runs."""
        return self._denoiser.network

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised latents, (B, C, H, W) float32, for noisy latents x."""
        return self._denoiser(x, sigma)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C', H / f, W / f) float32 of images (B, C, H, W) in [-1, 1], on the images' device."""
        weight = next(self.autoencoder.parameters())
        at_once = max(1, PIXELS_AT_ONCE // (images.shape[-1] * images.shape[-2]))
        with evaluating(self.autoencoder):
            parts = [
                self.autoencoder.encode(some.to(weight.device, weight.dtype)).latent_dist.mode().float().to(images.device)
                for some in images.split(at_once)
            ]
        return (torch.cat(parts) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W) float32, about in [-1, 1], of latents (B, C', H', W')."""
        weight = next(self.autoencoder.parameters())
        z = latents / self.scale + self.shift
        at_once = max(1, PIXELS_AT_ONCE // (z.shape[-1] * z.shape[-2] * self.downsampling**2))
        with evaluating(self.autoencoder):
            parts = [
                self.autoencoder.decode(some.to(weight.device, weight.dtype)).sample.float().to(latents.device)
                for some in z.split(at_once)
            ]
        return torch.cat(parts)
