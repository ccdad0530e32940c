"""Flow matching: velocity networks as denoisers, and sampling by their ODE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlflow_icr.extraction.denoisers import Call, run_network


class FlowDenoiser:
    """A network v(x_t, t) trained by flow matching on the straight path x_t = (1 - t) x + t noise, whose velocity is noise - x.

    t is the share of noise, 0 to 1; noise sigma on clean images means t = sigma / (1 + sigma) and x_t = x / (1 + sigma); the
    clean image is x_t - t v. The network gets t times `time_scale`: 1000 is diffusers' convention, 1 that of SiT's own code.
    A scheduler's `shift` changes at which t one samples or trains, not what t means to the network. The `null_class` of a
    class-conditional network is used where no labels are given; `call` runs a network with another condition. Raises
    ValueError for a time_scale that is not positive.
    Source: Lipman et al. 2023; Ma et al. 2024 (SiT), section 2, with the linear interpolant; Esser et al. 2024, section 2.
    """

    def __init__(
        self, network: nn.Module, *, time_scale: float = 1000.0, null_class: int | None = None, call: Call | None = None
    ) -> None:
        if not time_scale > 0:
            raise ValueError(f"time_scale is {time_scale}; expected a positive number")
        self._network, self._call = network, call
        self.time_scale, self.null_class = time_scale, null_class

    @property
    def network(self) -> nn.Module:
        """The wrapped network."""
        return self._network

    def velocity(self, x: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """v(x_t, t), (B, C, H, W) float32, of x_t of that shape, t in [0, 1], a float or (B,), and classes (B,)."""
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])
        # A network that also predicts a variance has it in further channels.
        return run_network(self._network, x, self.time_scale * t, labels, self.null_class, self._call)[:, : x.shape[1]]

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """The denoised images, (B, C, H, W) float32, for x of that shape, sigma > 0, a float or (B,), and classes (B,)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(x.shape[0])
        t = sigma / (1 + sigma)
        scale = (1 + sigma).view(-1, 1, 1, 1)
        return x / scale - t.view(-1, 1, 1, 1) * self.velocity(x / scale, t, labels)

    @torch.no_grad()
    def sample(self, noise: Tensor, *, num_steps: int = 25, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), about in [-1, 1], from unit noise of that shape: dx/dt = v from t = 1 to 0 by Heun's method.

        Steps in t are equal; costs 2 num_steps calls of the network. Raises ValueError for no steps.
        Source: Ma et al. 2024, the probability flow ODE.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}; expected at least 1")
        x, step = noise.to(torch.float32), 1 / num_steps
        for i in range(num_steps):
            t = 1 - i * step
            slope = self.velocity(x, t, labels)
            next_slope = self.velocity(x - step * slope, max(0.0, t - step), labels)
            x = x - step * (slope + next_slope) / 2
        return x
