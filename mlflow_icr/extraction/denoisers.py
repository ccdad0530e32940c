"""Denoisers: one call D(x, sigma) for the clean image that a network sees in a noisy one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Denoiser(Protocol):
    """Anything with a `network` to tap and a call D(x, sigma) that runs it.

    x is (B, C, H, W) in [-1, 1] plus noise of standard deviation sigma, a float or (B,); the result has x's shape.
    """

    @property
    def network(self) -> nn.Module:
        """The network that a call runs."""

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The clean image that is seen in x."""


def device_of(denoiser: Denoiser) -> torch.device:
    """Where a denoiser's network lives; the CPU when it has no parameters."""
    return next((p.device for p in denoiser.network.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """A context in which a network is in evaluation mode; each module's training flag is as it was found afterwards."""
    flags = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


class EDMDenoiser:
    """EDM's preconditioning around a network F(x, time), such as diffusers' UNet2DModel.

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise); `sigma_data` is the standard deviation of clean images.
    Source: Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", table 1.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"sigma_data is {sigma_data}; expected a positive number")
        self._network = network
        self.sigma_data = sigma_data

    @property
    def network(self) -> nn.Module:
        """The wrapped network."""
        return self._network

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised images, (B, C, H, W) float32, for x of that shape and sigma > 0, a float or (B,)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        s = sigma.view(-1, 1, 1, 1)
        variance = s.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = s * self.sigma_data / variance.sqrt()
        # UNet2DModel casts a Python float time to long; a tensor keeps c_noise as it is.
        output = self._network(x / variance.sqrt(), sigma.log() / 4)
        f = output.sample if hasattr(output, "sample") else output
        return c_skip * x + c_out * f.float()
