"""Flow matching as Stable Diffusion 3 and Flux do it: a network that predicts the velocity from images to noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import Call, run_network


class FlowMatchingDenoiser:
    """A velocity network v(z_t, t T) on z_t = (1 - t) x_0 + t noise, v = noise - x_0, trained with T timesteps.

    Noise sigma on clean images is t = sigma / (1 + sigma), z_t = (1 - t) x, and the clean image is z_t - t v. A scheduler's
    `shift` chooses at which t one samples or trains; what t means to the network is the same. Raises ValueError for T < 1.
    Source: Lipman et al. 2023, "Flow matching for generative modeling"; Esser et al. 2024 (Stable Diffusion 3), section 2.
    """

    def __init__(self, network: nn.Module, num_train_timesteps: int = 1000, *, call: Call | None = None) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; expected at least 1")
        self._network, self._call = network, call
        self.num_train_timesteps = num_train_timesteps

    @property
    def network(self) -> nn.Module:
        """The wrapped network."""
        return self._network

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """The denoised images, (B, C, H, W) float32, for x of that shape and sigma >= 0, a float or (B,)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        time = sigma / (1 + sigma)
        t = time.view(-1, 1, 1, 1)
        z = (1 - t) * x
        return z - t * run_network(self._network, z, time * self.num_train_timesteps, self._call)
